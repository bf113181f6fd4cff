"""Convolution with int8 weights and activations: exact integer sums, floating or uint8 images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pybigmodel.ops import _int8_conv_kernels as _int8_conv_kernels
from pybigmodel.ops._common import (
    CONV_ACTIVATIONS,
    ConvActivation,
    activation_code,
    refuse_derivative,
)
from pybigmodel.ops._conv_geometry import (
    Ints,
    Padding,
    batched,
    is_channels_last,
    per_axis,
    sides,
)
from pybigmodel.ops._int8_conv_kernels import window_of

_ops = torch.ops.pybigmodel
_pack_int8_conv_weight = _ops.pack_int8_conv_weight.default
_int8_conv_op = _ops.int8_conv.default


def int8_conv(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    kernel_size: Sequence[int],
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: ConvActivation = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    input_scale: float | None = None,
    input_zero_point: int = 0,
    residual_scale: float | None = None,
    residual_zero_point: int = 0,
    output_scale: float | None = None,
    output_zero_point: int = 0,
    channels_last: bool | None = None,
) -> Tensor:
    """Convolution in int8, from and to floating or uint8 images; for inference.

    ::

        y = act(s_o·s·Σ (q − z)·w + b + r),   x ≈ s·(q − z),   y ≈ s_y·(q_y − z_y)

    One scale s and zero point z for the whole image batch: given (static), or those of its range
    (dynamic). Padding reads the zero point, which stands for 0.

    Args:
        input: (N, C, spatial…) or (C, spatial…) of as many axes as kernel_size has entries, one to
            three; float32, bfloat16 or float16, which is quantised on the way, or uint8: q itself.
        packed_weight: of :func:`pack_int8_conv_weight`, with the same groups.
        weight_scale: (O,) float32: s_o, of either sign.
        kernel_size: one int an axis.
        bias: (O,), input's dtype or float32.
        stride, padding, dilation, groups, activation, negative_slope: as for
            :func:`pybigmodel.ops.conv2d`.
        residual: r, the output's shape, added before the activation: in the output's dtype (float32
            beside a uint8 output), or uint8, which stands for residual_scale·(r −
            residual_zero_point).
        input_scale, input_zero_point: s and z in [0, 255]. None: over the range of input and zero,
            s = (max − min)/255 and z = round(−min/s), as :func:`quantize_per_token` has it of a
            row; a uint8 input has no range to be found.
        output_scale, output_zero_point: s_y and z_y. None: the output is floating.
        channels_last: the layout of the result; None: input's.

    Returns:
        (N, O, spatial…) or (O, spatial…): uint8 where output_scale is given, else input's dtype,
        float32 of a uint8 input.

    Numerics: q = clamp(round(x/s) + z, 0, 255), rounding to nearest even, with 1/s rounded to fp32.
    The integer sums are exact: C / groups · taps is at most 65793, so that int32 cannot overflow;
    what comes after them is fp32, with one rounding at the end. Static: what is outside of the
    range is clamped to it, NaN becomes 0 of q. Dynamic: NaN or infinity in input makes the
    whole output NaN. A NaN result is 0 of q_y.

    Raises:
        RuntimeError: a wrong dtype, shape or device, a scale that is missing or no positive number,
            or a tensor that requires grad while gradients are recorded, naming the argument.
        ValueError: an unknown activation, a scale that is not above 0, or a geometry
            of another form.
    """
    op = "int8_conv"
    refuse_derivative(op, input=input, bias=bias, residual=residual)
    kernel = list(kernel_size)
    axes = len(kernel)
    steps, spread = per_axis(op, "stride", stride, axes), per_axis(op, "dilation", dilation, axes)
    around = sides(op, padding, axes, (kernel, steps, spread))
    with_batch = batched(op, input, axes)
    if not with_batch:
        input = input.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
    y: Tensor = _int8_conv_op(
        input,
        packed_weight,
        weight_scale,
        bias,
        residual,
        window_of(kernel, steps, around, spread),
        groups,
        activation_code(activation, CONV_ACTIVATIONS),
        negative_slope,
        _scale(op, "input", input_scale),
        input_zero_point,
        _scale(op, "residual", residual_scale),
        residual_zero_point,
        _scale(op, "output", output_scale),
        output_zero_point,
        is_channels_last(input) if channels_last is None else channels_last,
    )
    return y if with_batch else y.squeeze(0)


def int8_conv2d(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    kernel_size: Ints,
    *args: Any,
    **kwargs: Any,
) -> Tensor:
    """:func:`int8_conv` with two spatial axes: input (N, C, H, W) or (C, H, W); kernel_size may be
    an int."""
    kernel = per_axis("int8_conv2d", "kernel_size", kernel_size, 2)
    return int8_conv(input, packed_weight, weight_scale, kernel, *args, **kwargs)


def pack_int8_conv_weight(weight: Tensor, *, groups: int = 1) -> Tensor:
    """An int8 weight (O, C / groups, kernel…) in the layout that :func:`int8_conv` reads.

    (groups·⌈O'/16⌉, taps·⌈C'/4⌉ + 1, 64) int8: panels of 16 output channels, each a sequence of
    64-byte groups with 4 consecutive input channels of a tap, padded with zeros; O' and C' are the
    channels of a group. The last group of a panel holds the int32 sums of its filters, which zero
    points need.

    Args:
        weight: int8, of one to three axes; :func:`quantize_weight` makes it.
        groups: divides O.

    Raises:
        RuntimeError: a wrong dtype or shape.
    """
    packed: Tensor = _pack_int8_conv_weight(weight, groups)
    return packed


def _scale(op: str, name: str, scale: float | None) -> float:
    """The op's argument, in which 0 stands for None."""
    if scale is None:
        return 0.0
    if not scale > 0:
        raise ValueError(f"{op}: {name}_scale must be above 0, or None; got {scale}")
    return scale
