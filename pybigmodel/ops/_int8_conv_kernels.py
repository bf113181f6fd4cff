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
    check_channels,
    check_conv_activation,
    check_dims,
    check_geometry,
    check_groups,
    out_sizes,
)
from pybigmodel.ops._conv_geometry import ALGORITHMS
from pybigmodel.ops._conv_kernels import image

DIRECT, DIRECT_ROWS = ALGORITHMS["direct"], ALGORITHMS["direct_rows"]
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
            f"{op}: window must have {PER_AXIS * axes} entries, {PER_AXIS} an axis, got "
            f"{tuple(window)}"
        ),
    )
    kernel, stride, before, after, dilation = (list(window[i::PER_AXIS]) for i in range(PER_AXIS))
    padding = [side for pair in zip(before, after, strict=True) for side in pair]
    return kernel, stride, padding, dilation


def packed_sizes(weight: Sequence[int], groups: int, algorithm: int) -> list[int]:
    """The shape of a packed weight (out_channels, in_channels / groups, kernel…)."""
    n, c, *kernel = weight
    run = kernel[-1] if algorithm == DIRECT_ROWS else 1
    lanes = math.prod(kernel) // run * check.ceil_div(run * c, 4)
    panels = groups * check.ceil_div(n // groups, check.PANEL)
    return [panels, lanes + 1, check.GROUP_BYTES]


def _check_algorithm(op: str, algorithm: int, groups: int, dilation: int) -> None:
    torch._check(
        algorithm in (DIRECT, DIRECT_ROWS),
        lambda: f"{op}: algorithm must be 1 (direct) or 2 (direct_rows), got {algorithm}",
    )
    torch._check(
        algorithm == DIRECT or (groups == 1 and dilation == 1),
        lambda: (
            f"{op}: algorithm 2 takes groups = 1 and a dilation of 1 of the last axis, got "
            f"groups = {groups} and dilation {dilation}"
        ),
    )


def _check_terms(op: str, channels: int, kernel: Sequence[int]) -> None:
    terms = channels * math.prod(kernel)
    torch._check(
        terms <= check.MAX_INT8_K,
        lambda: (
            f"{op}: a filter must have at most {check.MAX_INT8_K} weights, so that int32 sums "
            f"cannot overflow; got {terms}"
        ),
    )


def _check_quantiser(
    op: str, name: str, scale: float, zero_point: int, *, required: str | None = None
) -> None:
    """A scale of 0 stands for none, where there may be none."""
    torch._check(
        math.isfinite(scale) and scale >= 0,
        lambda: f"{op}: {name}_scale must be finite and at least 0, got {scale}",
    )
    torch._check(
        required is None or scale > 0,
        lambda: f"{op}: {name}_scale must be above 0 {required}, got {scale}",
    )
    torch._check(
        0 <= zero_point <= 255,
        lambda: f"{op}: {name}_zero_point must be in [0, 255], got {zero_point}",
    )


@torch.library.register_fake("pybigmodel::pack_int8_conv_weight")
def _pack_int8_conv_weight_fake(weight: Tensor, groups: int, algorithm: int) -> Tensor:
    op = "pack_int8_conv_weight"
    check.check_dtype(op, "weight", weight, torch.int8)
    check_dims(op, "weight", weight, "(out_channels, in_channels of a group, kernel…)")
    check_groups(op, groups, weight.shape[0])
    _check_algorithm(op, algorithm, groups, 1)
    _check_terms(op, weight.shape[1], weight.shape[2:])
    return weight.new_empty(packed_sizes(weight.shape, groups, algorithm))


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
    algorithm: int,
    channels_last: bool,
) -> Tensor:
    op = "int8_conv"
    check.check_dtype(op, "input", input, *check.FLOAT_DTYPES, torch.uint8)
    check_dims(op, "input", input, "(N, C, spatial)")
    kernel, stride, padding, dilation = _apart(op, input.dim() - 2, window)
    check_geometry(op, input.dim() - 2, kernel, stride, padding, dilation)
    channels = input.shape[1]
    check_groups(op, groups, channels, "channels of input")
    check.check_dtype(op, "weight_scale", weight_scale, torch.float32)
    check.check_dim(op, "weight_scale", weight_scale, 1)
    check.check_same_device(op, "weight_scale", weight_scale, input)
    n = weight_scale.shape[0]
    check_groups(op, groups, n)
    sizes = out_sizes(op, input, kernel, stride, padding, dilation)
    check_channels(op, input, groups, channels // groups)
    _check_terms(op, channels // groups, kernel)
    _check_algorithm(op, algorithm, groups, dilation[-1])
    packed = packed_sizes((n, channels // groups, *kernel), groups, algorithm)
    why = (
        f"must be contiguous with shape {tuple(packed)}, as pack_int8_conv_weight makes it for "
        "this convolution and algorithm"
    )
    check.check_dtype(op, "packed_weight", packed_weight, torch.int8)
    check.check_shape(op, "packed_weight", packed_weight, packed, why)
    check.check_contiguous(op, "packed_weight", packed_weight)
    check.check_same_device(op, "packed_weight", packed_weight, input)
    quantised = input.dtype == torch.uint8
    floating = torch.float32 if quantised else input.dtype
    if bias is not None:
        check.check_shape(op, "bias", bias, (n,), f"must have shape ({n},)")
        check.check_dtype(op, "bias", bias, *dict.fromkeys((floating, torch.float32)))
        check.check_same_device(op, "bias", bias, input)
    check_conv_activation(op, activation)
    required = "for a uint8 input" if quantised else None
    _check_quantiser(op, "input", input_scale, input_zero_point, required=required)
    _check_quantiser(op, "output", output_scale, output_zero_point)
    shape = (input.shape[0], n, *sizes)
    dtype = torch.uint8 if output_scale > 0 else floating
    if residual is not None:
        other = torch.float32 if output_scale > 0 else floating
        check.check_dtype(op, "residual", residual, other, torch.uint8)
        check.check_same_device(op, "residual", residual, input)
        check.check_shape(op, "residual", residual, shape, f"must have the output's shape {shape}")
        required = "for a uint8 residual" if residual.dtype == torch.uint8 else None
        _check_quantiser(op, "residual", residual_scale, residual_zero_point, required=required)
    return image(input.new_empty(0, dtype=dtype), shape, channels_last)


# --- autocast -----------------------------------------------------------------------------------


def _cast_at(args: Sequence[Any]) -> tuple[int, ...]:
    """All but the weight's scales, which stay float32, and what belongs to a uint8 image: the bias
    beside such an input, the residual beside such an output."""
    input, *_, output_scale, _, _, _ = args
    if input.dtype == torch.uint8:
        return ()
    return (0, 3) if output_scale > 0 else (0, 3, 4)


register_autocast("int8_conv", _cast_at)
