"""What a convolution layer does with inputs of one shape, and its product with the packed weight.

The one place below pybigmodel.nn that knows the arguments of the convolution ops.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from pybigmodel import _native
from pybigmodel.nn._packing import ConvKey, cacheable, packed_for
from pybigmodel.ops import _flops
from pybigmodel.ops._checks import FLOAT_DTYPES
from pybigmodel.ops._conv_geometry import AUTO, Geometry, exact_algorithm, sides
from pybigmodel.ops._conv_geometry import is_channels_last as is_channels_last

_ops = torch.ops.pybigmodel
conv_op = _ops.conv.default
conv_packed_op = _ops.conv_packed.default
conv_transpose_op = _ops.conv_transpose.default

_PLANNED = (*FLOAT_DTYPES, torch.uint8)
MOST = 64  # shapes for which a layer remembers what it does


class Cache(dict[Any, Any]):
    """What a layer can make again: a copied or unpickled layer has none of it."""

    take_turns = False  # whether keys that were let go came back

    @cached_property
    def gone(self) -> WeakSet[nn.Module]:
        """Of keys that were let go."""
        return WeakSet()

    def __deepcopy__(self, memo: dict[int, Any]) -> Cache:
        return Cache()

    def __copy__(self) -> Cache:
        return Cache()

    def __reduce__(self) -> tuple[Callable[[], Cache], tuple[()]]:
        return Cache, ()


class Plan:
    """The arguments of ``conv_packed`` for inputs of one shape and layout."""

    __slots__ = ("after", "before", "channels_last", "dtype", "key", "out_shape", "weight_shape")

    def __init__(
        self, layer: Any, input: Tensor, weight: Tensor, extra: Sequence[int] = ()
    ) -> None:
        """extra: padding beside the layer's, before and after, axis by axis."""
        kernel, groups = list(weight.shape[2:]), layer.groups
        padding = padding_of(layer)
        if extra:
            padding = [a + b for a, b in zip(padding, extra, strict=True)]
        stride, dilation = list(layer.stride), list(layer.dilation)
        bf16 = layer._precision == 1 or weight.dtype == torch.bfloat16
        self.channels_last: bool = layer._channels_last or is_channels_last(weight)
        if layer._channels_last is None:
            self.channels_last = self.channels_last or is_channels_last(input)
        algorithm = _native.conv_algorithm(
            *(list(input.shape), list(weight.shape), stride, padding, dilation, groups, bf16),
            *(layer._exact, self.channels_last),
        )
        self.dtype, self.weight_shape = weight.dtype, weight.shape
        self.key = ConvKey(groups, layer._precision, algorithm)
        self.before = (weight.shape[0], kernel)
        self.after = (stride, padding, dilation, groups)
        images = (input.shape[2:], kernel, stride, dilation, padding[::2], padding[1::2])
        steps = zip(*images, strict=True)
        sizes = [(n + p + q - (k - 1) * d - 1) // s + 1 for n, k, s, d, p, q in steps]
        self.out_shape = torch.Size((input.shape[0], weight.shape[0], *sizes))

    def run(
        self,
        input: Tensor,
        packed: Tensor,
        bias: Tensor | None,
        residual: Tensor | None = None,
        activation: int = 0,
        slope: float = 0.0,
    ) -> Tensor:
        y: Tensor = conv_packed_op(
            input,
            packed,
            *self.before,
            bias,
            residual,
            *self.after,
            activation,
            slope,
            self.key.algorithm,
            self.channels_last,
        )
        return y


def padding_of(layer: Any) -> list[int]:
    """Before and after, axis by axis; none where the layer pads in another mode than with zeros."""
    axes = len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return [0] * (2 * axes)
    same = (layer.kernel_size, layer.stride, layer.dilation)
    return sides(type(layer).__name__, layer.padding, axes, same)


def algorithm_of(layer: Any, input: Tensor, channels_last: bool) -> int:
    """Of `conv`, for which the exact one is a number."""
    if not layer._exact:
        return AUTO
    weight = (layer.out_channels, layer.in_channels // layer.groups, *layer.kernel_size)
    bf16 = layer._precision == 1 or input.dtype == torch.bfloat16
    size: Sequence[int] = input.shape[2:]
    if isinstance(input, torch.fx.Proxy):  # which knows neither
        size, bf16, channels_last = [1] * len(layer.kernel_size), False, True
    options = (list(layer.stride), padding_of(layer), list(layer.dilation), layer.groups)
    return exact_algorithm(Geometry(size, weight, *options, bf16), channels_last)


# --- conv_cached: as linear_cached is, the product with the copy that is looked up when it runs ---

_library = torch.library.Library("pybigmodel", "FRAGMENT")
_library.define(
    "conv_cached(Tensor input, Tensor weight, Tensor? bias, int[] stride, int[] padding, "
    "int[] dilation, int groups, int precision, bool exact, bool channels_last) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def _conv_cached(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: int,
    exact: bool,
    channels_last: bool,
) -> Tensor:
    geometry = (stride, padding, dilation, groups)
    bf16 = precision == 1 or weight.dtype == torch.bfloat16
    algorithm = _native.conv_algorithm(
        *(list(input.shape), list(weight.shape), list(stride), list(padding), list(dilation)),
        *(groups, bf16, exact, channels_last),
    )
    fits = input.shape[1] == groups * weight.shape[1] and input.dtype == weight.dtype
    y: Tensor
    if not algorithm or not fits or not cacheable(weight):
        y = conv_op(input, weight, bias, *geometry, precision, algorithm, channels_last)
    else:
        packed = packed_for(weight, ConvKey(groups, precision, algorithm))[1]
        y = conv_packed_op(
            *(input, packed, weight.shape[0], list(weight.shape[2:]), bias, None),
            *(*geometry, 0, 0.0, algorithm, channels_last),
        )
    return y


def _without_choice(function: Any, *arguments: Any) -> Any:
    """Of `conv`, for which the exact algorithm is a number."""
    *tensors_and_geometry, exact, channels_last = arguments
    input, weight, _, stride, padding, dilation, groups, precision = tensors_and_geometry
    bf16 = precision == 1 or weight.dtype == torch.bfloat16
    size, sizes = input.shape[2:], weight.shape
    geometry = Geometry(size, sizes, stride, padding, dilation, groups, bf16)
    algorithm = exact_algorithm(geometry, channels_last) if exact else AUTO
    return function(*tensors_and_geometry, algorithm, channels_last)


conv_cached = _ops.conv_cached.default
_library.impl("conv_cached", _conv_cached, "CPU")
_library.impl("conv_cached", partial(_without_choice, conv_op), "AutocastCPU")


def _conv_cached_fake(*arguments: Any) -> Tensor:
    y: Tensor = _without_choice(conv_op, *arguments)
    return y


torch.library.register_fake("pybigmodel::conv_cached", _conv_cached_fake, lib=_library)


register_flop_formula(_ops.conv_cached)(_flops.conv)


def pad_in_mode(layer: nn.Module, input: Tensor) -> Tensor:
    """What comes before a convolution whose padding_mode is not "zeros"."""
    padding = layer._reversed_padding_repeated_twice
    return nn.functional.pad(input, padding, mode=layer.padding_mode)  # type: ignore[arg-type]


NORMS: dict[type[nn.Module], int] = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}


def is_norm(module: Any, layer: Any) -> bool:
    """Whether it is a BatchNorm that can be folded into the convolution."""
    return (
        NORMS.get(type(module)) == len(layer.kernel_size) + 2
        and module.num_features == layer.out_channels
    )


def plan_for(layer: Any, x: Tensor, weight: Any, pad: Any) -> Any:
    """What the layer does with inputs like x, that `pad` pads before; None where it is not one op
    or leaves nothing."""
    key: Any = x.shape if layer._channels_last else (x.shape, x.stride())
    if pad is not None:
        key = key, pad
    plan = layer._plans.get(key)
    if plan is None or plan.dtype is not x.dtype or plan.weight_shape != weight.shape:
        plan = _new_plan(layer, x, weight, pad, key)
    return plan


def _new_plan(layer: Any, x: Tensor, weight: Any, pad: Any, key: Any) -> Any:
    if x.dtype not in _PLANNED:  # the layer says why
        return None
    extra = () if pad is None else _sides_of(pad, layer, x)
    if extra is None:
        return None
    if len(layer._plans) >= MOST:
        layer._plans.clear()
    plan = layer._new_plan(x, weight, extra)
    if min(plan.out_shape[2:], default=1) < 1:
        return None
    layer._plans[key] = plan
    return plan


def _sides_of(pad: Any, layer: Any, x: Tensor) -> tuple[int, ...] | None:
    """How far the function pads an image of this shape with zeros, before and after, axis by axis:
    from what it does to one of ones; None where it does something else."""
    ones = torch.ones((1, 1, *x.shape[2:]))
    padded = pad(ones, layer)
    if padded.dim() != ones.dim() or float(padded.sum()) != ones.numel():
        return None
    sides = []
    for axis in range(2, ones.dim()):
        others = [other for other in range(ones.dim()) if other != axis]
        there = padded.amax(others).nonzero().flatten().tolist()
        if len(there) != x.shape[axis] or there[-1] - there[0] + 1 != len(there):
            return None
        sides += [there[0], padded.shape[axis] - there[-1] - 1]
    return tuple(sides)
