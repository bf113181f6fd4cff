"""A model for inference without its Python code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_structure, tree_unflatten

from pybigmodel._measure import difference, eval_mode, split_inputs
from pybigmodel._record import Program, Recorder, storage_of
from pybigmodel._report import log
from pybigmodel._torch_private import autocast_enabled

MOST = 64  # kinds of inputs; of more the oldest is forgotten
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
_TENSOR = object()  # in the place of one


@dataclass(frozen=True)
class _Recorded:
    program: Program
    values: list[Any]  # what the model gave, _TENSOR in the place of tensors
    spec: TreeSpec

    def outputs(self, tensors: Sequence[Tensor]) -> Any:
        results = iter(self.program(*tensors))
        values = [next(results) if value is _TENSOR else value for value in self.values]
        return tree_unflatten(values, self.spec)


class Frozen(nn.Module):
    """What :func:`freeze` makes of a model; called as the model is, and in inference whatever its
    mode."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = False
        self._forget()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        _check_call(tensors)
        kind = spec, _kind_of(leaves)
        known = self._programs.get(kind)
        if known is None or self._changed():
            known = self._record(kind, leaves, spec)
        with torch.no_grad():
            return known.outputs(tensors)

    def train(self, mode: bool = True) -> Frozen:
        return self

    def _apply(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "a frozen model keeps its device and dtype: move the model it was made from, and "
            "freeze that"
        )

    def __getstate__(self) -> dict[str, Any]:
        own = ("_programs", "_lock", "_watched", "_versions")  # a copy records anew
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._forget()

    def _forget(self) -> None:
        self._programs: dict[Any, _Recorded] = {}
        self._lock = threading.Lock()
        self._watched: list[Tensor] = []
        self._versions: list[int] = []

    def _changed(self) -> bool:
        """Whether a weight was written since the programs were made."""
        return [tensor._version for tensor in self._watched] != self._versions

    def _record(self, kind: Any, leaves: list[Any], spec: TreeSpec) -> _Recorded:
        with self._lock, torch.no_grad(), eval_mode(self.model):
            if self._changed() or not self._programs:
                self._programs.clear()
                all_weights = (*self.model.parameters(), *self.model.buffers())
                self._watched = [tensor for tensor in all_weights if not tensor.is_inference()]
                self._versions = [tensor._version for tensor in self._watched]
            known = self._programs.get(kind)
            if known is None:
                known = _recorded(self.model, leaves, spec)
                _check(self.model, known, leaves, spec)
                while len(self._programs) >= MOST:
                    del self._programs[next(iter(self._programs))]
                self._programs[kind] = known
            return known


def freeze(model: nn.Module, example_inputs: Any = None) -> Frozen:
    """The model in inference without its Python code: the ops of one run, recorded and run again.

    What surrounds the ops of a model (modules that call modules, checks, hooks) costs 15 µs a layer
    where it is in the caches, and several times that between layers that have emptied them. What
    is left are the calls of ops, and convolutions that follow one another are one call
    (:func:`pybigmodel.optimize` the model before). Results are the model's, bit for bit.

    The model's Python runs at the first call with inputs of a kind (shapes, strides, dtypes, which
    of them are one tensor, arguments that are no tensors), on copies of them, and not after it:
    branches, hooks and what surrounds the call (as :func:`pybigmodel.sdpa`) stay as they were
    then. 64 kinds are kept. Weights are followed: after a write to one that torch counts all is
    recorded again; after an exchange of one, or of a layer, freeze again.

    Refused is what might not be the same at every call: a model that reads values of tensors
    (``item()``, branches, ``tolist()``, ``numpy()``; transformers' models do with a mask of two
    dimensions, and want one of four or none, and ``use_cache=False``), whose shapes depend on them,
    that draws random numbers, or that writes to tensors of its own. Each program is run beside the
    model on other values before it is used; where the model fails on these, on the given ones, and
    a warning in the log says so.

    Args:
        model: any torch.nn.Module; it is run in eval mode, and stays as it is.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, to record at
            once.

    Returns:
        A module that is called as the model is. Arguments and results are tensors, numbers and
        strings, or hold them in types that torch.utils._pytree knows: tuples, lists, dicts,
        transformers' outputs.

    Raises:
        TypeError: not a module; a result or an argument of another type.
        RuntimeError: the model cannot be frozen, and why; under autocast, or where an input wants a
            gradient.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be a torch.nn.Module, got {type(model).__name__}")
    frozen = Frozen(model)
    if example_inputs is not None:
        args, kwargs = split_inputs(example_inputs)
        frozen(*args, **kwargs)
    return frozen


def _kind_of(leaves: Sequence[Any]) -> tuple[Any, ...]:
    kinds: list[Any] = []
    seen: dict[int, int] = {}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            first = seen.setdefault(id(leaf), i)
            kinds.append((leaf.shape, leaf.stride(), leaf.dtype, leaf.device, first))
        elif isinstance(leaf, _PLAIN):
            kinds.append((type(leaf), repr(leaf)))
        else:
            raise TypeError(
                "freeze: arguments must be tensors, numbers and strings, in tuples, lists and "
                f"dicts; got {type(leaf).__name__}"
            )
    return tuple(kinds)


def _check_call(tensors: Sequence[Tensor]) -> None:
    if autocast_enabled():
        raise RuntimeError("freeze: a frozen model has its own dtypes: call it outside of autocast")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("freeze: a frozen model records no gradient, which an input requires")


def _recorded(model: nn.Module, leaves: list[Any], spec: TreeSpec) -> _Recorded:
    _run(model, _copied(leaves), spec)  # packs weights
    inputs = _copied(leaves)
    with Recorder([leaf for leaf in inputs if isinstance(leaf, Tensor)]) as recorder:
        result = _run(model, inputs, spec)
    outputs, of_result = tree_flatten(result)
    for leaf in outputs:
        if not isinstance(leaf, (Tensor, *_PLAIN)):
            raise TypeError(
                "freeze: the model must give tensors, numbers and strings, in types that "
                f"torch.utils._pytree knows; got {type(leaf).__name__}"
            )
    program = recorder.program([leaf for leaf in outputs if isinstance(leaf, Tensor)])
    values = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in outputs]
    return _Recorded(program, values, of_result)


def _run(model: nn.Module, leaves: list[Any], spec: TreeSpec) -> Any:
    arguments = tree_unflatten(leaves, spec)
    args, kwargs = arguments
    result = model(*args, **kwargs)
    if tree_structure(arguments) != spec:
        raise RuntimeError("freeze: the model changes a list or a dict that it is given")
    return result


def _check(model: nn.Module, known: _Recorded, leaves: list[Any], spec: TreeSpec) -> None:
    """On other values of the same kind, which may go another way through the model's code."""
    for copied in (_others, _copied):
        try:
            expected, of_expected = tree_flatten(_run(model, copied(leaves), spec))
        except Exception as error:  # values that mean nothing to the model: the given have to do
            if copied is _copied:
                raise
            log.warning("freeze: checked on the given values alone, others fail: %s", error)
            continue
        tensors = [leaf for leaf in copied(leaves) if isinstance(leaf, Tensor)]
        got, of_got = tree_flatten(known.outputs(tensors))
        if of_got != of_expected or not all(map(_agree, got, expected)):
            raise RuntimeError(
                "freeze: with other values in its inputs the model gives something else than the "
                "ops that were recorded: its code depends on values, or on chance"
            )
        return


def _agree(got: Any, wanted: Any) -> bool:
    if not isinstance(got, Tensor) or not isinstance(wanted, Tensor):
        return type(got) is type(wanted) and repr(got) == repr(wanted)
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        return False
    if got.is_complex():
        got, wanted = (
            torch.view_as_real(got.resolve_conj()),
            torch.view_as_real(wanted.resolve_conj()),
        )
    if not got.is_floating_point():
        return torch.equal(got, wanted)
    return difference(got, wanted)[0] < 1e-4


# --- copies, which share memory with each other as the originals do -----------------------------


def _copied(leaves: Sequence[Any]) -> list[Any]:
    return _copies(leaves, lambda flat: flat)


def _others(leaves: Sequence[Any]) -> list[Any]:
    """With other values: floats shuffled and moved by their spread; or, without any, integers."""
    generator = torch.Generator().manual_seed(0)
    floats = any(isinstance(leaf, Tensor) and leaf.is_floating_point() for leaf in leaves)

    def change(flat: Tensor) -> Tensor:
        if not flat.is_floating_point():
            integers = flat.dtype is not torch.bool and not flat.is_complex()
            return flat if floats or not integers else flat.roll(1)
        values = flat.float().cpu()
        spread = float(values[values.isfinite()].std(correction=0).nan_to_num()) or 1.0
        order = torch.randperm(len(values), generator=generator)
        noise = torch.randn(len(values), generator=generator)
        return (values[order] + 0.5 * spread * noise).to(flat)

    return _copies(leaves, change)


def _copies(leaves: Sequence[Any], change: Callable[[Tensor], Tensor]) -> list[Any]:
    storages: dict[int, torch.UntypedStorage] = {}
    copies: dict[int, Tensor] = {}

    def copy(leaf: Tensor) -> Tensor:
        storage = storage_of(leaf)
        if storage is None or leaf.is_conj() or leaf.is_neg():
            return leaf.clone()
        new = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
        if storage not in storages:
            storages[storage] = leaf.untyped_storage().clone()
            flat = torch.empty_like(new).set_(storages[storage])
            flat.copy_(change(flat))
        place = leaf.storage_offset(), leaf.size(), leaf.stride()
        return new.set_(storages[storage], *place)

    for leaf in leaves:
        if isinstance(leaf, Tensor) and id(leaf) not in copies:
            copies[id(leaf)] = copy(leaf)
    return [copies.get(id(leaf), leaf) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
