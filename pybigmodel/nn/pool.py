"""torch.nn's pooling of images on this library's kernels, in inference."""

from __future__ import annotations

import operator
from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from pybigmodel._torch_private import (
    dispatch_modes,
    forward_ad,
    jit_tracing_state,
    transforms_active,
)
from pybigmodel.nn._int8_image import IMAGES
from pybigmodel.ops._checks import FLOAT_DTYPES
from pybigmodel.ops._conv_geometry import is_channels_last

_ops = torch.ops.pybigmodel
_max_pool2d_op = _ops.max_pool2d.default
_avg_pool2d_op = _ops.avg_pool2d.default
_adaptive_avg_pool2d_op = _ops.adaptive_avg_pool2d.default
_TAKEN = frozenset(FLOAT_DTYPES)


class _Pool(nn.Module):
    """Before torch's class, which does what the ops do not: gradients, other tensors."""

    # Whether images are given in that layout, as `optimize` has it; None: in the input's.
    _channels_last: bool | None = None

    def forward(self, input: Tensor) -> Any:
        if is_dynamo_compiling():  # which the backends compile as they like
            return super().forward(input)
        if type(input) in IMAGES:
            return self._of_image(input)
        if not is_plain(input):
            return super().forward(input)
        return self._pooled(input)

    def keep_layout(self) -> None:
        """Give images in the layout of the input, where `optimize` had them turned."""
        self._channels_last = None

    def _pooled(self, input: Tensor) -> Tensor:
        """By the op. Its wrapper's checks are the op's or made here: they would cost as much as a
        small pooling takes."""
        if input.dim() == 3:
            return self._of_batch(input.unsqueeze(0)).squeeze(0)
        return self._of_batch(input)

    @abstractmethod
    def _of_batch(self, input: Tensor) -> Tensor:
        """Of a batch, by the layer's op."""

    def _of_image(self, input: Any) -> Any:
        """Of what one int8 convolution gives to others: as floats."""
        return super().forward(input)

    def _windows(self) -> list[list[Any]]:
        """Kernel, stride and padding."""
        layer: Any = self
        kernel, stride = _pair(layer.kernel_size), layer.stride
        steps = kernel if stride is None else _pair(stride) or kernel
        return [kernel, steps, _pair(layer.padding)]

    def _last(self, input: Tensor) -> bool:
        """The layout of the result."""
        return self._channels_last or is_channels_last(input)


def _pair(value: Any) -> list[Any]:
    """As torch reads them: whatever counts as an int, or one or two of these; None stays."""
    if type(value) is int:
        return [value, value]
    given = list(value) if isinstance(value, tuple | list) else [value]
    entries = [None if entry is None else operator.index(entry) for entry in given]
    return entries * 2 if len(entries) == 1 else entries


def is_plain(input: Any) -> bool:
    """Whether it is a tensor that the ops take, of which nothing is recorded."""
    return (
        type(input) is Tensor
        and input.dtype in _TAKEN
        and input.device.type == "cpu"
        and input.layout is torch.strided
        and input.dim() in (3, 4)
        and not (torch.is_grad_enabled() and input.requires_grad)
        and forward_ad._current_level < 0
        and not transforms_active()
        and dispatch_modes() == 0
        and jit_tracing_state() is None
    )


class MaxPool2d(_Pool, nn.MaxPool2d):
    """Drop-in for :class:`torch.nn.MaxPool2d`: :func:`pybigmodel.ops.max_pool2d` in inference.

    Images of float32, bfloat16 and float16 on the CPU; a result of an int8 convolution that stays
    in uint8 between layers (:func:`pybigmodel.optimize`) goes through in uint8. torch's own runs
    where a gradient is recorded, where indices are wanted, under torch.compile, torch.func and
    tracing, and for other dtypes, devices and kinds of tensors.

    Args:
        kernel_size, stride, padding, dilation, return_indices, ceil_mode: as torch's.

    Raises:
        RuntimeError: a geometry that leaves nothing, naming the argument.
    """

    def forward(self, input: Tensor) -> Any:
        if self.return_indices:
            return nn.MaxPool2d.forward(self, input)
        return super().forward(input)

    def _of_batch(self, input: Tensor) -> Tensor:
        how = (*self._windows(), _pair(self.dilation), self.ceil_mode)
        y: Tensor = _max_pool2d_op(input, *how, self._last(input))
        return y

    def _of_image(self, input: Any) -> Any:
        # With dilation a window may have no pixel: −∞, of which bytes know nothing.
        if _pair(self.dilation) == [1, 1]:
            return input.pooled(self._pooled)
        return super()._of_image(input)


class AvgPool2d(_Pool, nn.AvgPool2d):
    """Drop-in for :class:`torch.nn.AvgPool2d`: :func:`pybigmodel.ops.avg_pool2d` in inference,
    torch's own where :class:`MaxPool2d` says."""

    def _of_batch(self, input: Tensor) -> Tensor:
        if self.divisor_override == 0:  # of the op's arguments it is none
            raise RuntimeError("pybigmodel.nn.AvgPool2d: divisor_override must not be 0")
        counted = (self.ceil_mode, self.count_include_pad, self.divisor_override or 0)
        y: Tensor = _avg_pool2d_op(input, *self._windows(), *counted, self._last(input))
        return y


class AdaptiveAvgPool2d(_Pool, nn.AdaptiveAvgPool2d):
    """Drop-in for :class:`torch.nn.AdaptiveAvgPool2d`: :func:`pybigmodel.ops.adaptive_avg_pool2d`
    in inference, torch's own where :class:`MaxPool2d` says."""

    def _of_batch(self, input: Tensor) -> Tensor:
        sizes: list[Any] = _pair(self.output_size)
        if None in sizes:
            axes = zip(sizes, input.shape[2:], strict=True)
            sizes = [have if want is None else want for want, have in axes]
        if 0 in sizes:  # nothing, which torch gives and the op refuses
            return nn.AdaptiveAvgPool2d.forward(self, input)
        y: Tensor = _adaptive_avg_pool2d_op(input, sizes, self._last(input))
        return y


# By torch's class.
POOLS: dict[type[nn.Module], type[_Pool]] = {
    nn.MaxPool2d: MaxPool2d,
    nn.AvgPool2d: AvgPool2d,
    nn.AdaptiveAvgPool2d: AdaptiveAvgPool2d,
}
