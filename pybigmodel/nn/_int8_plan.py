"""What an int8 convolution does with inputs of one shape: the arguments of its op."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pybigmodel.nn._conv_plan import is_channels_last, padding_of
from pybigmodel.nn._int8_image import NOT_QUANTISED
from pybigmodel.ops._int8_conv_kernels import PER_AXIS, window_of

int8_conv_op = torch.ops.pybigmodel.int8_conv.default


def window_with(layer: Any, extra: Sequence[int] = ()) -> list[int]:
    """extra: padding beside the layer's, before and after, axis by axis."""
    padding = padding_of(layer)
    if extra:
        padding = [a + b for a, b in zip(padding, extra, strict=True)]
    return window_of(layer.kernel_size, layer.stride, padding, layer.dilation)


class Int8Plan:
    """The arguments of ``int8_conv`` for inputs of one shape and layout."""

    __slots__ = (
        *("_channels_last", "_geometry", "_quantiser", "dtype", "floating", "out_shape"),
        "weight_shape",
    )

    key = None  # there is one packed copy, whatever the shape

    def __init__(
        self, layer: Any, input: Tensor, packed: Tensor, extra: Sequence[int] = ()
    ) -> None:
        window, last = window_with(layer, extra), layer._channels_last
        self.dtype, self.weight_shape = input.dtype, packed.shape
        # Of the result, where it is not uint8.
        self.floating = torch.float32 if input.dtype == torch.uint8 else input.dtype
        self._geometry = window, layer.groups
        self._quantiser = layer.input_scale or 0.0, layer.input_zero_point
        self._channels_last = is_channels_last(input) if last is None else last
        axes = zip(input.shape[2:], *(window[i::PER_AXIS] for i in range(PER_AXIS)), strict=True)
        sizes = [(n + p + q - (k - 1) * d - 1) // s + 1 for n, k, s, p, q, d in axes]
        self.out_shape = torch.Size((input.shape[0], layer.out_channels, *sizes))

    def run(
        self,
        input: Tensor,
        packed: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        residual: Tensor | None = None,
        activation: int = 0,
        slope: float = 0.0,
        of_input: tuple[float, int] = NOT_QUANTISED,
        of_residual: tuple[float, int] = NOT_QUANTISED,
        of_output: tuple[float, int] = NOT_QUANTISED,
    ) -> Tensor:
        """of_…: scale and zero point of what is, or will be, uint8."""
        of_input = of_input if of_input[0] else self._quantiser
        y: Tensor = int8_conv_op(
            *(input, packed, scales, bias, residual, *self._geometry, activation, slope),
            *(*of_input, *of_residual, *of_output, self._channels_last),
        )
        return y
