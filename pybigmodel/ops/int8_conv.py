"""Convolution with int8 weights and activations: exact integer sums, floating or uint8 images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias

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
    LANES,
    Ints,
    Padding,
    batched,
    is_channels_last,
    per_axis,
    sides,
)
from pybigmodel.ops._int8_conv_kernels import DIRECT, DIRECT_ROWS, window_of

Int8ConvAlgorithm: TypeAlias = Literal["direct", "direct_rows"]

_ops = torch.ops.pybigmodel
_pack_int8_conv_weight = _ops.pack_int8_conv_weight.default
_int8_conv_op = _ops.int8_conv.default
_CODES = {"direct": DIRECT, "direct_rows": DIRECT_ROWS}


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
    algorithm: Int8ConvAlgorithm = "direct",
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
        packed_weight: of :func:`pack_int8_conv_weight`, with the same groups and algorithm.
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
        algorithm: the one that the weight was packed for.
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
        ValueError: an unknown activation or algorithm, a scale that is not above 0, or a geometry
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
        _code(algorithm),
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


def pack_int8_conv_weight(
    weight: Tensor, *, groups: int = 1, algorithm: Int8ConvAlgorithm = "direct"
) -> Tensor:
    """An int8 weight (O, C / groups, kernel…) in the layout that :func:`int8_conv` reads.

    (groups·⌈O'/16⌉, runs·⌈run/4⌉ + 1, 64) int8: panels of 16 output channels, each a sequence of
    64-byte groups with 4 consecutive values of a run for each channel, padded with zeros; O' and C'
    are the channels of a group. A run is the C' channels of a tap ("direct"), or a row of taps side
    by side, kernel_width·C' values ("direct_rows", for few channels: one group, no dilation along
    the row). The last group of a panel holds the int32 sums of its filters, which zero points need.

    Args:
        weight: int8, of one to three axes; :func:`quantize_weight` makes it.
        groups: divides O.
        algorithm: the one that will read it; :func:`int8_conv_algorithm` chooses.

    Raises:
        RuntimeError: a wrong dtype or shape, one that the algorithm does not take, or more than
            65793 weights a filter (int32 sums could overflow).
        ValueError: an unknown algorithm.
    """
    packed: Tensor = _pack_int8_conv_weight(weight, groups, _code(algorithm))
    return packed


def int8_conv_algorithm(
    weight_shape: Sequence[int], *, dilation: Ints = 1, groups: int = 1
) -> Int8ConvAlgorithm:
    """The algorithm expected to be the faster one for a weight (O, C / groups, kernel…)."""
    spread = per_axis("int8_conv_algorithm", "dilation", dilation, len(weight_shape) - 2)
    few = weight_shape[1] < LANES and weight_shape[-1] > 1
    return "direct_rows" if few and groups == 1 and spread[-1] == 1 else "direct"


def _code(algorithm: str) -> int:
    try:
        return _CODES[algorithm]
    except (KeyError, TypeError):  # the latter: a list, say
        raise ValueError(
            f"algorithm must be one of {', '.join(_CODES)}; got {algorithm!r}"
        ) from None


def _scale(op: str, name: str, scale: float | None) -> float:
    """The op's argument, in which 0 stands for None."""
    if scale is None:
        return 0.0
    if not scale > 0:
        raise ValueError(f"{op}: {name}_scale must be above 0, or None; got {scale}")
    return scale
