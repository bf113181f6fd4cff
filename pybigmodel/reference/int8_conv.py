"""Convolution in int8 as it is defined, in plain PyTorch: the integer sums are exact."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pybigmodel.reference.conv import activate, conv
from pybigmodel.reference.linear import quantize_per_token


def quantize(input: Tensor, scale: float, zero_point: int) -> Tensor:
    """``clamp(round(x/s) + z, 0, 255)`` with 1/s rounded to float32; of NaN 0."""
    s = torch.tensor(scale, dtype=torch.float32)
    q = (input.float() * (1 / s)).round() + zero_point
    return q.nan_to_num(nan=0.0).clamp(0, 255).to(torch.uint8)


def dequantize(q: Tensor, scale: float | Tensor, zero_point: int | Tensor) -> Tensor:
    """``(q − z)·s`` in float64, the scale being a float32 one."""
    s = torch.as_tensor(scale, dtype=torch.float32, device=q.device).double()
    return (q.double() - zero_point) * s


def int8_conv(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    input_scale: float | None = None,
    input_zero_point: int = 0,
    residual_scale: float | None = None,
    residual_zero_point: int = 0,
    output_scale: float | None = None,
    output_zero_point: int = 0,
) -> Tensor:
    """``act(s_o·s·Σ (q − z)·w + b + r)`` in float64, or uint8 where output_scale is given.

    Of weight (O, C / groups, kernel…) int8; padding: before and after, by axis. Without an
    input_scale it is that of the whole tensor, as :func:`quantize_per_token` has it of a row.
    """
    if input_scale is None:
        q, scale, zero = quantize_per_token(input.reshape(-1))
        x = (q.double() - zero).view(input.shape)
    else:
        scale = torch.tensor(input_scale, dtype=torch.float32)
        q = input if input.dtype == torch.uint8 else quantize(input, input_scale, input_zero_point)
        x = q.double() - input_zero_point
    geometry = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    sums = conv(x, weight.double(), **geometry)  # type: ignore[arg-type]
    per_channel = (-1, *[1] * (input.dim() - 2))
    y = sums * (weight_scale.double() * scale.double()).view(per_channel)
    if bias is not None:
        y = y + bias.double().view(per_channel)
    if residual is not None:
        if residual.dtype == torch.uint8:
            assert residual_scale is not None
            y = y + dequantize(residual, residual_scale, residual_zero_point)
        else:
            y = y + residual.double()
    y = activate(y, activation, negative_slope)
    if output_scale is None:
        return y
    s = torch.tensor(output_scale, dtype=torch.float32).double()
    return ((y / s).round() + output_zero_point).nan_to_num(nan=0.0).clamp(0, 255).to(torch.uint8)
