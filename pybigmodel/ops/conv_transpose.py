"""Transposed convolution in fp32 and bf16: the gradient of a convolution, as a layer."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pybigmodel._torch_private import below_autograd, forward_ad
from pybigmodel.ops import _conv_kernels as _conv_kernels
from pybigmodel.ops._common import Precision, precision_code, refuse_forward_mode
from pybigmodel.ops._conv_geometry import (
    Ints,
    LayerAlgorithm,
    Padding,
    batched,
    is_exact,
    per_axis,
    sides,
    wants_channels_last,
)

_conv_transpose_op = torch.ops.pybigmodel.conv_transpose.default


def conv_transpose2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    precision: Precision = "fp32",
    algorithm: LayerAlgorithm = "auto",
) -> Tensor:
    """Transposed convolution with the weight as torch stores it; differentiable.

    ::

        y[n, o, j] = b[o] + Σ_c Σ_{i, t: i·stride + t·dilation − pad = j} w[c, o, t]·x[n, c, i]

    c over the channels of o's group, pixels i and j and taps t of two axes: what the gradient of
    :func:`conv2d` does to that of its output. Each remainder of j by the stride is a convolution of
    its own with the taps that reach it; no zeros are multiplied.

    Args:
        input: (N, C, H, W) or (C, H, W), float32, bfloat16 or float16. One in channels_last is read
            in place, another is converted once a call.
        weight: (C, O / groups, kernel height, kernel width), input's dtype.
        bias: (O,), input's dtype or float32.
        stride: an int, or one an axis; at least 1.
        padding: an int, one an axis, or a pair (before, after) an axis: so many pixels of the
            result are cut off.
        output_padding: an int, or one an axis, smaller than stride or dilation: so many pixels are
            added at the end.
        groups: divides C and O; those of one group see each other only.
        dilation: an int, or one an axis; at least 1.
        precision: "fp32", or "bf16": products of operands rounded to bfloat16, summed in fp32.
            bfloat16 tensors always take the latter.
        algorithm: "auto", or "direct": no Winograd, in its gradients neither (docs/numerics.md).

    Returns:
        (N, O, H', W') or (O, H', W'), H' = (H − 1)·stride − pad before − pad after +
        dilation·(kernel − 1) + output_padding + 1, input's dtype; channels_last if input or weight
        is, by torch's rule.

    Numerics: fp32 accumulation in chains of at most 256 terms (512 in bf16) that are then added up,
    one rounding to the output's dtype. A NaN or ∞ in the image spoils the outputs that see it.
    bfloat16 products treat subnormals as zero on the avx512_bf16 tier.

    Raises:
        RuntimeError: a wrong dtype, shape or device, naming the argument; a second derivative.
        NotImplementedError: a forward-mode derivative.
        ValueError: an unknown precision or algorithm, or a geometry of another form.

    Source: Dumoulin and Visin, "A guide to convolution arithmetic for deep learning", 2016.
    """
    options = (stride, padding, output_padding, groups, dilation), precision, algorithm
    return _conv_transpose("conv_transpose2d", 2, input, weight, bias, *options)


def conv_transpose1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    precision: Precision = "fp32",
    algorithm: LayerAlgorithm = "auto",
) -> Tensor:
    """:func:`conv_transpose2d` with one spatial axis: input (N, C, L) or (C, L), weight
    (C, O / groups, K)."""
    options = (stride, padding, output_padding, groups, dilation), precision, algorithm
    return _conv_transpose("conv_transpose1d", 1, input, weight, bias, *options)


def conv_transpose3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    output_padding: Ints = 0,
    groups: int = 1,
    dilation: Ints = 1,
    *,
    precision: Precision = "fp32",
    algorithm: LayerAlgorithm = "auto",
) -> Tensor:
    """:func:`conv_transpose2d` with three spatial axes: input (N, C, D, H, W) or (C, D, H, W),
    weight (C, O / groups, kernel depth, height, width)."""
    options = (stride, padding, output_padding, groups, dilation), precision, algorithm
    return _conv_transpose("conv_transpose3d", 3, input, weight, bias, *options)


def _conv_transpose(
    op: str,
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    geometry: tuple[Ints, Padding, Ints, int, Ints],
    precision: Precision,
    algorithm: LayerAlgorithm,
) -> Tensor:
    stride, padding, output_padding, groups, dilation = geometry
    if forward_ad._current_level >= 0:
        refuse_forward_mode(op, input=input, weight=weight, bias=bias)
    x = input if batched(op, input, axes) else input.unsqueeze(0)
    arguments = (
        x,
        weight,
        bias,
        per_axis(op, "stride", stride, axes),
        sides(op, padding, axes),
        per_axis(op, "output_padding", output_padding, axes),
        per_axis(op, "dilation", dilation, axes),
        groups,
        precision_code(precision),
        is_exact(algorithm),
        wants_channels_last(x, weight),
    )
    y: Tensor
    if torch.is_grad_enabled() or is_dynamo_compiling():
        y = _conv_transpose_op(*arguments)
    else:
        y = below_autograd(_conv_transpose_op, *arguments)
    return y if x is input else y.squeeze(0)
