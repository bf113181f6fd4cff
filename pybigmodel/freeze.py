"""A model for inference without its Python code."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from pybigmodel._measure import difference, eval_mode, split_inputs
from pybigmodel._record import Program, Recorder
from pybigmodel._torch_private import autocast_enabled

MOST = 16  # kinds of inputs; of more the oldest is forgotten
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)


class Frozen(nn.Module):
    """What :func:`freeze` makes of a model; called as the model is.

    Each kind of inputs (shapes, strides, dtypes, other arguments) has a program of its own, made at
    its first call.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._programs: dict[Any, tuple[Program, Any]] = {}
        self.training = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        kind = spec, tuple(map(_kind_of, leaves))
        known = self._programs.get(kind)
        if known is None:
            known = self._record(kind, args, kwargs)
        program, result = known
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        _check_call(tensors)
        with torch.no_grad():
            outputs = iter(program(*tensors))
        values, of_result = result
        return tree_unflatten([next(outputs) if v is _TENSOR else v for v in values], of_result)

    def train(self, mode: bool = True) -> Frozen:
        if mode:
            raise RuntimeError("a frozen model is for inference: train the model it was made from")
        return self

    def _apply(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError(
            "a frozen model keeps its device and dtype: move the model it was made from, and "
            "freeze that"
        )

    def __reduce_ex__(self, _: Any) -> Any:
        raise TypeError("a frozen model cannot be copied or pickled: freeze a copy of its model")

    def _record(self, kind: Any, args: Any, kwargs: Any) -> tuple[Program, Any]:
        with torch.no_grad(), eval_mode(self.model):
            known = _recorded(self.model, args, kwargs)
            self._check(known, args, kwargs)
        while len(self._programs) >= MOST:
            del self._programs[next(iter(self._programs))]
        self._programs[kind] = known
        return known

    def _check(self, known: tuple[Program, Any], args: Any, kwargs: Any) -> None:
        """On other values of the same kind, which may go another way through the model's code."""
        generator = torch.Generator().manual_seed(0)
        args, kwargs = tree_map(lambda leaf: _shuffled(leaf, generator), (args, kwargs))
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        inputs = [t.clone() for t in tensors]
        expected = tree_flatten(self.model(*args, **kwargs))[0]
        expected = [leaf for leaf in expected if isinstance(leaf, Tensor)]
        for got, wanted in zip(known[0](*inputs), expected, strict=True):
            if got.shape != wanted.shape or difference(got, wanted)[0] > 1e-4:
                raise RuntimeError(
                    "freeze: with other values in its inputs the model gives something else than "
                    "the ops that were recorded: its code depends on values, or on chance"
                )


def freeze(model: nn.Module, example_inputs: Any = None) -> Frozen:
    """The model in inference without its Python code: the ops of one run, recorded and run again.

    What surrounds the ops of a model (modules that call modules, checks, hooks) costs 15 µs a layer
    where it is in the caches, and several times that between layers that have emptied them. What
    is left are the calls of ops, and convolutions that follow one another are one call
    (:func:`pybigmodel.optimize` the model before). Results are the model's, bit for bit.

    As torch.jit.freeze does, it takes the weights as they are now: freeze again after a change. The
    model's Python runs at the first call with inputs of a kind, never after it: numbers and
    branches stay as they were then. A model that reads values of tensors (``item()``), whose shapes
    depend on them, or that writes to its own buffers is refused; and each program is checked
    against the model on other values before it is used.

    Args:
        model: any torch.nn.Module; it is run in eval mode, and stays as it is.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments, to record at
            once.

    Returns:
        A module that is called as the model is. Results that are or hold tensors must be of types
        that torch.utils._pytree knows, as are tuples, dicts and transformers' outputs.

    Raises:
        TypeError: not a module; a result or an argument of another type.
        RuntimeError: the model cannot be frozen, and why; autocast or a gradient is wanted.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"freeze: model must be a torch.nn.Module, got {type(model).__name__}")
    frozen = Frozen(model)
    if example_inputs is not None:
        args, kwargs = split_inputs(example_inputs)
        frozen(*args, **kwargs)
    return frozen


_TENSOR = object()  # in the place of one


def _kind_of(leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return leaf.shape, leaf.stride(), leaf.dtype, leaf.device
    if isinstance(leaf, _PLAIN):
        return type(leaf), leaf
    raise TypeError(
        "freeze: arguments must be tensors, numbers and strings, in tuples, lists and dicts; got "
        f"{type(leaf).__name__}"
    )


def _check_call(tensors: list[Tensor]) -> None:
    if autocast_enabled():
        raise RuntimeError("freeze: a frozen model has its own dtypes: call it outside of autocast")
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError("freeze: a frozen model records no gradient, which an input requires")


def _recorded(model: nn.Module, args: Any, kwargs: Any) -> tuple[Program, Any]:
    inputs = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    _check_call(inputs)
    model(*args, **kwargs)  # packs weights
    with Recorder(inputs) as recorder:
        result = model(*args, **kwargs)
    leaves, spec = tree_flatten(result)
    for leaf in leaves:
        if not isinstance(leaf, (Tensor, *_PLAIN)):
            raise TypeError(
                "freeze: the model must give tensors, numbers and strings, in types that "
                f"torch.utils._pytree knows; got {type(leaf).__name__}"
            )
    program = recorder.program([leaf for leaf in leaves if isinstance(leaf, Tensor)])
    values = [_TENSOR if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return program, (values, spec)


def _shuffled(leaf: Any, generator: torch.Generator) -> Any:
    if not isinstance(leaf, Tensor) or leaf.numel() < 2:
        return leaf
    order = torch.randperm(leaf.numel(), generator=generator).to(leaf.device)
    other = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device=leaf.device)
    return other.copy_(leaf.flatten()[order].view(leaf.shape))
