"""Which layers of a model `optimize` can replace, and why it leaves the others."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils.parametrize import is_parametrized

from pybigmodel._swap import (
    BLOCKS,
    OUR_CONVOLUTIONS,
    OUR_INT8,
    OUR_POOLS,
    OWN,
    float_precision,
)
from pybigmodel._torch_private import has_kernel
from pybigmodel.nn import Linear
from pybigmodel.nn._activation import hooked
from pybigmodel.nn.conv import CONVOLUTIONS
from pybigmodel.nn.multihead_attention import WEIGHTS
from pybigmodel.nn.pool import POOLS
from pybigmodel.ops._attention_checks import MAX_HEAD_DIM
from pybigmodel.ops._checks import FLOAT_DTYPES, MAX_INT8_K

Selection: TypeAlias = str | type[nn.Module] | Sequence[str | type[nn.Module]] | None

_OPS = {
    "fp32": ("linear", "linear_packed", "pack_linear_weight"),
    "bf16": ("linear", "linear_packed", "pack_linear_weight"),
    "int8": ("int8_linear", "pack_int8_linear_weight", "quantize_per_token"),
}
_CONV_OPS = ("conv", "conv_packed", "pack_conv_weight")
_INT8_CONV_OPS = ("int8_conv", "pack_int8_conv_weight")
LANE_CHANNELS = 16  # of a group: fewer leave lanes of an int8 product idle
_OURS: tuple[type[nn.Module], ...] = (
    Linear,
    *OUR_INT8,
    *BLOCKS.values(),
    *OUR_CONVOLUTIONS,
    *OUR_POOLS,
)
_KINDS: tuple[type[nn.Module], ...] = (nn.Linear, *OUR_INT8, *BLOCKS, *CONVOLUTIONS, *POOLS)
# What torch.nn.TransformerEncoderLayer.forward reads without calling it, and how it is called here.
_READ = {"linear1": "weight", "linear2": "weight", "self_attn": "weights"}


@dataclass(frozen=True)
class Candidate:
    """A layer; `left` is the reason for which it must stay, None if it may be replaced."""

    path: str
    module: nn.Module
    left: str | None
    selected: bool = True  # by include and exclude
    # The outermost layers that contain it, or it, and may be replaced: with them it is, or stays.
    units: tuple[str, ...] = ()
    in_float: str | None = None  # why it becomes a floating layer where int8 is asked for


def candidates(
    model: nn.Module, precision: str, include: Selection, exclude: Selection
) -> list[Candidate]:
    """Every layer of a kind that is known here, once, under the first of its names."""
    modules = dict(model.named_modules(remove_duplicate=False))
    included = _Selector("include", include, modules)
    excluded = _Selector("exclude", exclude, modules)
    names: defaultdict[nn.Module, list[str]] = defaultdict(list)
    for name, module in modules.items():
        if isinstance(module, _KINDS) or _is_conv1d(module):
            names[module].append(name)
    weights = _Weights(modules)
    own, unselected = {}, {}
    for module, known_as in names.items():
        own[module] = _why_left(module, precision, weights)
        if include is not None and not included.match(known_as):
            unselected[module] = "not in include"
        elif excluded.match(known_as):
            unselected[module] = "in exclude"
    left = _Reasons(modules, names, {**unselected, **{m: r for m, r in own.items() if r}})
    found = []
    for module, known_as in names.items():
        reason = left.of(module)
        units = () if reason else left.units(known_as)
        in_float = _why_not_int8(module, weights) if precision == "int8" else None
        selected = module not in unselected
        found.append(Candidate(known_as[0], module, reason, selected, units, in_float))
    return found


class _Reasons:
    """Why each layer stays, with what contains it and what it contains."""

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        names: Mapping[nn.Module, Sequence[str]],
        own: Mapping[nn.Module, str],
    ) -> None:
        self._modules, self._names, self._own = modules, names, own

    def of(self, module: nn.Module) -> str | None:
        contents = self._contents(module)
        if contents is not None:
            return contents
        for name in self._names[module]:
            parent, _, child = name.rpartition(".")
            reader: Any = self._modules[parent] if name else None
            reason = _why_read(reader, child, module)
            if reason is not None and (reader not in self._names or self.of(reader) is not None):
                return reason
        return None

    def _contents(self, module: nn.Module) -> str | None:
        """What speaks against the layer for itself and for what it needs."""
        if module in self._own:
            return self._own[module]
        if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
            none = all(self._stays(layer) for layer in module.layers)
            return "none of its layers is replaced" if none else None
        if type(module) in BLOCKS:
            for name in ("self_attn", "multihead_attn"):
                attention = module._modules.get(name)
                if attention is not None and self._stays(attention):
                    return f"its {name} stays"
        return None

    def _stays(self, module: nn.Module) -> bool:
        if isinstance(module, _OURS):
            return False
        return type(module) not in BLOCKS or self._contents(module) is not None

    def units(self, names: Sequence[str]) -> tuple[str, ...]:
        units = (
            next(
                prefix
                for prefix in _prefixes(name)
                if prefix == name
                or (type(self._modules[prefix]) in BLOCKS and not self.of(self._modules[prefix]))
            )
            for name in names
        )
        return tuple(dict.fromkeys(self._names[self._modules[unit]][0] for unit in units))


def _why_read(reader: nn.Module | None, child: str, module: nn.Module) -> str | None:
    """Why a layer has to stay while what contains it stays torch's."""
    if isinstance(reader, _OURS):
        return None
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "torch.nn.MultiheadAttention reads its weight and does not call it"
    # A forward of its own too: it may go on to torch's.
    if isinstance(reader, nn.TransformerEncoderLayer) and child in _READ:
        return (
            f"torch.nn.TransformerEncoderLayer's fast path reads its {_READ[child]} and does not "
            "call it"
        )
    return None


def _why_left(module: nn.Module, precision: str, weights: _Weights) -> str | None:
    """What speaks against a layer for itself alone."""
    # What the layer is, before what it holds: the weight of a layer of unknown kind says nothing.
    kind = type(module)
    if isinstance(module, _OURS):
        return f"is a pybigmodel.nn.{kind.__name__} already"
    if _is_conv1d(module):
        return "transformers' Conv1D stores its weight transposed, which is not supported"
    if isinstance(module, LazyModuleMixin):
        return "lazy: its size is not known before its first call"
    if is_parametrized(module):
        return "parametrized: its weight is computed anew at each call"
    if kind not in (nn.Linear, NonDynamicallyQuantizableLinear, *BLOCKS, *CONVOLUTIONS, *POOLS):
        bases: tuple[type[nn.Module], ...] = (nn.Linear, *BLOCKS, *CONVOLUTIONS, *POOLS)
        base = next(base for base in bases if isinstance(module, base))
        return f"a subclass of torch.nn.{base.__name__}, {kind.__module__}.{kind.__qualname__}"
    if "forward" in vars(module):
        return "its forward is replaced on the instance"
    taken = next((name for name in OWN if name in vars(module)), None)
    if taken is not None:
        return f"has an attribute {taken}, which is one of its replacement's"
    if isinstance(module, nn.MultiheadAttention):
        return _why_attention_left(module, precision, weights)
    if kind in POOLS and getattr(module, "return_indices", False):
        return "gives indices, which torch's alone does"
    if kind in POOLS:
        return weights.no_pools
    if kind in BLOCKS:
        return None
    if "weight" not in module._parameters or "bias" not in module._parameters:
        return "a hook computes its weight (weight_norm, spectral_norm, pruning)"
    weight = module._parameters["weight"]
    if kind not in CONVOLUTIONS:
        return _why_weight_left(weight, precision, weights)
    if weight is not None and weight.numel() == 0:
        return "without channels"
    ops = ("conv_transpose",) if "Transpose" in kind.__name__ else _CONV_OPS
    return _why_weight_left(weight, float_precision(precision), weights, ops)


def _why_not_int8(module: Any, weights: _Weights) -> str | None:
    """Of a convolution; of other layers there is nothing between int8 and staying."""
    if not any(isinstance(module, kind) for kind in CONVOLUTIONS):
        return None
    if isinstance(module, LazyModuleMixin):
        return None
    if module.transposed:
        return "transposed convolutions have no int8 kernel"
    weight, groups = module._parameters.get("weight"), module.groups
    each = module.in_channels // groups
    if groups > 1 and groups == module.in_channels:
        return "depthwise: bound by memory, not by products"
    if groups > 1 and each < LANE_CHANNELS:
        return f"its groups have {each} channels each, fewer than {LANE_CHANNELS}"
    terms = each * math.prod(module.kernel_size)
    if terms > MAX_INT8_K:
        return f"its filters have {terms} weights, above {MAX_INT8_K}: int32 sums could overflow"
    if weight is None:
        return None
    tied = weights.tied(weight)
    if len(tied) > 1:
        return f"tied ({' = '.join(tied)}): an int8 copy would no longer be"
    missing = _missing_op(weight.device.type, *_INT8_CONV_OPS)
    return None if missing is None else f"on device {weight.device}, there is no {missing}"


def _why_attention_left(
    module: nn.MultiheadAttention, precision: str, weights: _Weights
) -> str | None:
    if module.head_dim > MAX_HEAD_DIM:
        return f"its heads are wider than {MAX_HEAD_DIM}"
    out: Any = module.out_proj
    if hooked(out) or (type(out).forward is not nn.Linear.forward and type(out) is not Linear):
        return "its out_proj is more than a linear layer, and torch does not call it"
    if not module._parameters.keys() >= {*WEIGHTS, "in_proj_bias"}:
        return "a hook computes its weight (weight_norm, spectral_norm, pruning)"
    own = float_precision(precision)
    for name in WEIGHTS:
        weight = module._parameters[name]
        if weight is not None:
            missing = _missing_op(weight.device.type, *_OPS[own], "attention")
            if missing is not None:
                return f"on device {weight.device}, for which there is no {missing}"
            reason = _why_weight_left(weight, own, weights)
            if reason is not None:
                return reason
    return None


def _why_weight_left(
    weight: Tensor | None, precision: str, weights: _Weights, ops: tuple[str, ...] = ()
) -> str | None:
    if type(weight) is not nn.Parameter:
        return f"its weight is a {type(weight).__module__}.{type(weight).__qualname__}"
    if weight.layout is not torch.strided:
        return f"its weight is {weight.layout}"
    if weight.dtype not in FLOAT_DTYPES:
        return f"its weight is {weight.dtype}"
    missing = _missing_op(weight.device.type, *(ops or _OPS[precision]))
    if missing is not None:
        return f"on device {weight.device}, for which there is no {missing}"
    if precision == "int8":
        if weight.shape[1] > MAX_INT8_K:
            return f"in_features is above {MAX_INT8_K}: int32 sums could overflow"
        tied = weights.tied(weight)
        if len(tied) > 1:
            return f"tied ({' = '.join(tied)}): an int8 copy would no longer be"
        return None
    # A packed copy of these could go out of date without a sign (see nn/_packing.py).
    if weight.is_inference():
        return "an inference tensor, whose changes go unseen: load it outside inference_mode"
    if weight.is_shared():
        return "in shared memory, where another process could change it unseen"
    overlapping = weights.overlapping(weight)
    if overlapping is not None:
        return f"shares memory with {overlapping}, another tensor: changes could go unseen"
    return None


def _is_conv1d(module: nn.Module) -> bool:
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def _missing_op(device: str, *ops: str) -> str | None:
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device)
    for op in ops:
        if key is None or not has_kernel(f"pybigmodel::{op}", key):
            return op
    return None


class _Selector:
    """Name patterns and types; a layer matches if it or a module that contains it does."""

    def __init__(
        self, argument: str, selection: Selection, modules: Mapping[str, nn.Module]
    ) -> None:
        if selection is None:
            selection = ()
        elif isinstance(selection, str | type) or not isinstance(selection, Sequence):
            selection = (selection,)
        self._modules = modules
        self._selectors = tuple(selection)
        for selector in self._selectors:
            is_type = isinstance(selector, type) and issubclass(selector, nn.Module)
            if not is_type and not isinstance(selector, str):
                raise TypeError(
                    f"{argument} must be a name pattern, a module type or a sequence of these; "
                    f"got {selector!r}"
                )
            # A misspelt name must not pass for an empty selection.
            if not any(_fits(selector, name, module) for name, module in modules.items()):
                raise ValueError(f"{argument}: {selector!r} matches no module of the model")

    def match(self, names: Sequence[str]) -> bool:
        return any(
            _fits(selector, prefix, self._modules[prefix])
            for name in names
            for prefix in _prefixes(name)
            for selector in self._selectors
        )


def _fits(selector: str | type[nn.Module], name: str, module: nn.Module) -> bool:
    if isinstance(selector, str):
        return fnmatchcase(name, selector)
    return isinstance(module, selector)


def _prefixes(name: str) -> Iterator[str]:
    yield ""
    for at, letter in enumerate(name):
        if letter == ".":
            yield name[:at]
    if name:
        yield name


class _Weights:
    """Who else holds a tensor, or memory of it."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._holders: defaultdict[int, list[str]] = defaultdict(list)
        spans: dict[int, tuple[int, int, int]] = {}
        first: dict[nn.Module, str] = {}
        for prefix, module in modules.items():
            first.setdefault(module, prefix)
        for module, prefix in first.items():
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                if tensor is not None:
                    self._holders[id(tensor)].append(f"{prefix}.{name}" if prefix else name)
                    span = _span(tensor)
                    if span is not None:
                        spans[id(tensor)] = (*span, id(tensor))
        self._spans = sorted(spans.values())
        self.no_pools = _why_no_pools(first)

    def tied(self, tensor: Tensor) -> list[str]:
        return self._holders[id(tensor)]

    def overlapping(self, tensor: Tensor) -> str | None:
        span = _span(tensor)
        if span is None:
            return None
        for begin, end, other in self._spans:
            if begin >= span[1]:
                break
            if end > span[0] and other != id(tensor):
                return self._holders[other][0]
        return None


def _why_no_pools(modules: Iterable[nn.Module]) -> str | None:
    """Why every pooling would be torch's: they hold no tensors, and others say what they get."""
    held = (t for m in modules for t in (*m._parameters.values(), *m._buffers.values()))
    tensors = [t for t in held if t is not None and t.is_floating_point()]
    here = [t for t in tensors if t.device.type == "cpu"]
    if tensors and not here:
        return f"on device {tensors[0].device}, for which there is no pooling"
    if here and not any(t.dtype in FLOAT_DTYPES for t in here):
        return f"the model is {here[0].dtype}"
    return None


def _span(tensor: Tensor) -> tuple[int, int] | None:
    """The addresses [begin, end) of a tensor that has such."""
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    if not plain or tensor.device.type != "cpu" or not tensor.numel():
        return None
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()
