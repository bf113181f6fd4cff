"""Fake kernels of int8 convolution: what csrc/cpu/int8_conv.cpp refuses, in the same words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pybigmodel.ops import _checks as check
from pybigmodel.ops._autocast import register_autocast
from pybigmodel.ops._conv_checks import (
    check_conv_activation,
    check_dims,
    check_groups,
    out_sizes,
)
from pybigmodel.ops._conv_kernels import image

PER_AXIS = 5  # kernel, stride, padding before and after, dilation


def window_of(
    kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> list[int]:
    """The op's argument of that name; padding: before and after, axis by axis."""
    sides = zip(padding[::2], padding[1::2], strict=True)
    axes = zip(kernel, stride, sides, dilation, strict=True)
    return [value for k, s, (before, after), d in axes for value in (k, s, before, after, d)]


def _apart(op: str, axes: int, window: Sequence[int]) -> tuple[list[int], ...]:
    """Kernel, stride, padding, dilation."""
    torch._check(
        len(window) == PER_AXIS * axes,
        lambda: (
            f"{op}: window must have {PER_AXIS * axes} entries, kernel, stride, padding before and "
            f"after and dilation of each axis; got {tuple(window)}"
        ),
    )
    kernel, stride, before, after, dilation = (list(window[i::PER_AXIS]) for i in range(PER_AXIS))
    padding = [side for pair in zip(before, after, strict=True) for side in pair]
    return kernel, stride, padding, dilation


def packed_sizes(weight: Sequence[int], groups: int) -> list[int]:
    """The shape of a packed weight (out_channels, in_channels / groups, kernel…)."""
    n, c, *kernel = weight
    panels = groups * check.ceil_div(n // groups, check.PANEL)
    return [panels, math.prod(kernel) * check.ceil_div(c, 4) + 1, check.GROUP_BYTES]


def _check_terms(op: str, terms: int) -> None:
    torch._check(
        terms <= check.MAX_INT8_K,
        lambda: (
            f"{op}: in_channels of a group times the kernel's taps must be at most "
            f"{check.MAX_INT8_K}, so that int32 sums cannot overflow; got {terms}"
        ),
    )


def _check_quantised(op: str, name: str, scale: float, zero_point: int) -> None:
    """A scale of 0 stands for none."""
    torch._check(
        math.isfinite(scale) and scale >= 0,
        lambda: f"{op}: {name}_scale must be finite and at least 0, got {scale}",
    )
    torch._check(
        scale == 0 or 2.0**-126 <= scale <= 2.0**126,
        lambda: f"{op}: {name}_scale must be between 2^-126 and 2^126, got {scale}",
    )
    torch._check(
        0 <= zero_point <= 255,
        lambda: f"{op}: {name}_zero_point must be between 0 and 255, got {zero_point}",
    )


@torch.library.register_fake("pybigmodel::pack_int8_conv_weight")
def _pack_int8_conv_weight_fake(weight: Tensor, groups: int) -> Tensor:
    op = "pack_int8_conv_weight"
    check.check_dtype(op, "weight", weight, torch.int8)
    check_dims(op, "weight", weight, "(out_channels, in_channels of a group, kernel…)")
    check_groups(op, groups, weight.shape[0])
    return weight.new_empty(packed_sizes(weight.shape, groups))


@torch.library.register_fake("pybigmodel::int8_conv")
def _int8_conv_fake(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    window: Sequence[int],
    groups: int,
    activation: int,
    slope: float,
    input_scale: float,
    input_zero_point: int,
    residual_scale: float,
    residual_zero_point: int,
    output_scale: float,
    output_zero_point: int,
    channels_last: bool,
) -> Tensor:
    op = "int8_conv"
    quantised = input.dtype == torch.uint8
    check.check_dtype(op, "input", input, torch.uint8, *check.FLOAT_DTYPES)
    check_dims(op, "input", input, "(N, C, spatial)")
    _check_quantised(op, "input", input_scale, input_zero_point)
    torch._check(
        not quantised or input_scale > 0,
        lambda: f"{op}: input_scale must be above 0 where input is uint8, got {input_scale}",
    )
    _check_quantised(op, "output", output_scale, output_zero_point)
    check.check_dtype(op, "weight_scale", weight_scale, torch.float32)
    check.check_dim(op, "weight_scale", weight_scale, 1)
    check.check_same_device(op, "weight_scale", weight_scale, input)
    channels, n = input.shape[1], weight_scale.shape[0]
    check_groups(op, groups, channels, "channels of input")
    kernel, stride, padding, dilation = _apart(op, input.dim() - 2, window)
    sizes = out_sizes(op, input, kernel, stride, padding, dilation)
    check_groups(op, groups, n)
    weight = (n, channels // groups, *kernel)
    _check_terms(op, math.prod(weight[1:]))
    packed = packed_sizes(weight, groups)
    why = (
        f"must be contiguous with shape {tuple(packed)}, as pack_int8_conv_weight makes it for "
        "this convolution"
    )
    check.check_dtype(op, "packed_weight", packed_weight, torch.int8)
    check.check_shape(op, "packed_weight", packed_weight, packed, why)
    check.check_contiguous(op, "packed_weight", packed_weight)
    check.check_same_device(op, "packed_weight", packed_weight, input)
    floating = torch.float32 if quantised else input.dtype
    if bias is not None:
        check.check_shape(op, "bias", bias, (n,), f"must have shape ({n},)")
        check.check_dtype(op, "bias", bias, *dict.fromkeys((floating, torch.float32)))
        check.check_same_device(op, "bias", bias, input)
    check_conv_activation(op, activation)
    shape = (input.shape[0], n, *sizes)
    dtype = torch.uint8 if output_scale > 0 else floating
    if residual is not None:
        _check_residual(op, residual, input, shape, dtype, residual_scale, residual_zero_point)
    return image(input.new_empty(0, dtype=dtype), shape, channels_last)


def _check_residual(
    op: str,
    residual: Tensor,
    input: Tensor,
    shape: Sequence[int],
    output: torch.dtype,
    scale: float,
    zero_point: int,
) -> None:
    _check_quantised(op, "residual", scale, zero_point)
    beside = torch.float32 if output == torch.uint8 else output
    wanted, where = (torch.uint8, "above 0") if scale > 0 else (beside, "0")
    torch._check(
        residual.dtype == wanted,
        lambda: (
            f"{op}: residual must be {check.name_of(wanted)} where residual_scale is {where}, got "
            f"{check.name_of(residual.dtype)}"
        ),
    )
    check.check_same_device(op, "residual", residual, input)
    check.check_shape(
        op, "residual", residual, shape, f"must have the output's shape {tuple(shape)}"
    )


# --- autocast -----------------------------------------------------------------------------------


def _cast_at(args: Sequence[Any]) -> tuple[int, ...]:
    """All but the weight's scales, which stay float32, and what belongs to a uint8 image: the bias
    beside such an input, the residual beside such an output."""
    input, *_, output_scale, _, _ = args
    if input.dtype == torch.uint8:
        return ()
    return (0, 3) if output_scale > 0 else (0, 3, 4)


register_autocast("int8_conv", _cast_at)
