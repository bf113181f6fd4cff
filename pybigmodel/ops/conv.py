"""Convolution in fp32 and bf16: y = act(x * w + b + r)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pybigmodel import _native
from pybigmodel._torch_private import below_autograd, forward_ad
from pybigmodel.ops import _checks as check
from pybigmodel.ops import _conv_kernels as _conv_kernels
from pybigmodel.ops._autocast import cast
from pybigmodel.ops._common import (
    CONV_ACTIVATIONS,
    ConvActivation,
    Precision,
    activation_code,
    precision_code,
    refuse_derivative,
    refuse_forward_mode,
)
from pybigmodel.ops._conv_geometry import (
    ALGORITHMS,
    AUTO,
    ConvAlgorithm,
    Geometry,
    Ints,
    PackedAlgorithm,
    Padding,
    algorithm_code,
    batched,
    is_channels_last,
    packed_algorithm_code,
    per_axis,
    sides,
    wants_channels_last,
)
from pybigmodel.reference.conv import activate

_ops = torch.ops.pybigmodel
_conv_op = _ops.conv.default
_conv_packed = _ops.conv_packed.default
_pack_conv_weight = _ops.pack_conv_weight.default


def conv2d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: ConvActivation = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    precision: Precision = "fp32",
    algorithm: ConvAlgorithm = "auto",
) -> Tensor:
    """Convolution with the weight as torch stores it; differentiable.

    ::

        y[n, o, i] = act(b[o] + r[n, o, i] + Σ_ct w[o, c, t]·x[n, c, i·stride + t·dilation − pad])

    c over the channels of o's group, pixels i and taps t of two axes, x zero outside the image. The
    weight is packed at every call: for one that changes every step. For one that stays, see
    :func:`conv_packed`, which also fuses activation and residual.

    Args:
        input: (N, C, H, W) or (C, H, W), float32, bfloat16 or float16. One in channels_last is read
            in place, another is converted once a call.
        weight: (O, C / groups, kernel height, kernel width), input's dtype.
        bias: (O,), input's dtype or float32.
        stride: an int, or one an axis; at least 1.
        padding: an int, one an axis, or a pair (before, after) an axis; "valid" (none), or "same"
            (stride 1: the output has the input's size; of an odd total the greater part is after).
        dilation: an int, or one an axis; at least 1.
        groups: divides C and O; those of one group see each other only.
        activation: "none", "relu", "gelu" (erf), "gelu_tanh", "silu", "relu6", "hardswish" or
            "leaky_relu".
        negative_slope: of leaky_relu.
        residual: the output's shape and dtype, added before the activation.
        precision: "fp32", or "bf16": products of operands rounded to bfloat16, summed in fp32.
            bfloat16 tensors always take the latter.
        algorithm: "auto" chooses by the shape (:func:`conv_algorithm`). "direct" sums the products
            as they are, by one of four kernels. "winograd2" and "winograd4" are F(2×2, 3×3) and
            F(4×4, 3×3), for 3×3 kernels with stride and dilation 1 in float32 products. "depthwise"
            takes one filter a channel.

    Returns:
        (N, O, H', W') or (O, H', W'), input's dtype; channels_last if input or weight is, by
        torch's rule.

    Numerics: fp32 accumulation, direct in chains of at most 256 terms (512 in bf16) that are then
    added up, depthwise and of few channels in one chain (of the latter at most 400); one rounding
    to the output's dtype. Depthwise products are float32 ones in every precision. Winograd's error
    is at most ``1e-6·max|x|·Σ|w|`` (F(2×2)) and ``4e-5·max|x|·Σ|w|`` (F(4×4)), Σ over the weights
    of an output channel; of normally distributed tensors it is 5e-7 and 3.5e-6 of the result, up to
    2 and 12 times that of the direct sum; see docs/numerics.md. A NaN or ∞ in the image spoils the
    outputs that see it; under Winograd those of the tiles that do, and magnitudes above 1e36 may
    overflow. Under autograd, activation and residual run as torch ops on the rounded result.
    bfloat16 products treat subnormals as zero on the avx512_bf16 tier.

    Raises:
        RuntimeError: a wrong dtype, shape or device, or an algorithm that does not compute this
            convolution, naming the argument; a second derivative.
        NotImplementedError: a forward-mode derivative.
        ValueError: an unknown activation, precision or algorithm, or a geometry of another form.

    Source: Georganas et al., "Anatomy of High-Performance Deep Learning Convolutions on SIMD
    Architectures", 2018; Dukhan, "The Indirect Convolution Algorithm", 2019; Lavin and Gray, "Fast
    Algorithms for Convolutional Neural Networks", 2016.
    """
    geometry = (stride, padding, dilation, groups)
    epilogue = (activation, negative_slope, residual)
    return _conv("conv2d", 2, input, weight, bias, geometry, epilogue, precision, algorithm)


def conv1d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: ConvActivation = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    precision: Precision = "fp32",
    algorithm: ConvAlgorithm = "auto",
) -> Tensor:
    """:func:`conv2d` with one spatial axis: input (N, C, L) or (C, L), weight (O, C / groups, K).

    Channels-last are the strides (C·L, 1, C). There is no Winograd.
    """
    geometry = (stride, padding, dilation, groups)
    epilogue = (activation, negative_slope, residual)
    return _conv("conv1d", 1, input, weight, bias, geometry, epilogue, precision, algorithm)


def conv3d(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    activation: ConvActivation = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    precision: Precision = "fp32",
    algorithm: ConvAlgorithm = "auto",
) -> Tensor:
    """:func:`conv2d` with three spatial axes: input (N, C, D, H, W) or (C, D, H, W), weight
    (O, C / groups, kernel depth, height, width).

    Winograd takes images and kernels of depth 1.
    """
    geometry = (stride, padding, dilation, groups)
    epilogue = (activation, negative_slope, residual)
    return _conv("conv3d", 3, input, weight, bias, geometry, epilogue, precision, algorithm)


def _conv(
    op: str,
    axes: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    how: tuple[Ints, Padding, Ints, int],
    epilogue: tuple[ConvActivation, float, Tensor | None],
    precision: Precision,
    algorithm: ConvAlgorithm,
) -> Tensor:
    stride, padding, dilation, groups = how
    activation, negative_slope, residual = epilogue
    if forward_ad._current_level >= 0:
        refuse_forward_mode(op, input=input, weight=weight, bias=bias)
    activated, code = activation_code(activation, CONV_ACTIVATIONS), precision_code(precision)
    if weight.dim() != axes + 2:
        raise RuntimeError(
            f"{op}: weight must have {axes + 2} dimensions, (O, C / groups, kernel), got shape "
            f"{tuple(weight.shape)}"
        )
    steps, spread = per_axis(op, "stride", stride, axes), per_axis(op, "dilation", dilation, axes)
    around = sides(op, padding, axes, (weight.shape[2:], steps, spread))
    x = input if batched(op, input, axes) else input.unsqueeze(0)
    layout = wants_channels_last(x, weight)
    chosen = AUTO
    if algorithm != "auto":
        bf16 = code == 1 or x.dtype == torch.bfloat16
        geometry = Geometry(x.shape[2:], weight.shape, steps, around, spread, groups, bf16)
        chosen = algorithm_code(algorithm, geometry, layout)
    arguments = (x, weight, bias, steps, around, spread, groups, code, chosen, layout)
    y: Tensor
    if torch.is_grad_enabled() or is_dynamo_compiling():
        y = _conv_op(*arguments)
    else:
        y = below_autograd(_conv_op, *arguments)
    if x is not input:
        y = y.squeeze(0)
    if residual is not None:
        y = y + _like_output(op, residual, y)
    return activate(y, activation, negative_slope) if activated else y


def _like_output(op: str, residual: Tensor, y: Tensor) -> Tensor:
    device = y.device.type
    if torch.is_autocast_enabled(device):
        residual = cast(residual, device, y.dtype)
    if residual.shape != y.shape or residual.dtype != y.dtype:  # Dynamo follows it, not _checks
        raise RuntimeError(
            f"{op}: residual must be {check.name_of(y.dtype)} of the output's shape "
            f"{tuple(y.shape)}, got {check.name_of(residual.dtype)} of shape "
            f"{tuple(residual.shape)}"
        )
    return residual


# --- with a packed weight -----------------------------------------------------------------------


def conv_algorithm(
    input_shape: Sequence[int],
    weight_shape: Sequence[int],
    *,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    dtype: torch.dtype = torch.float32,
    precision: Precision = "fp32",
    exact: bool = False,
    channels_last: bool = True,
) -> PackedAlgorithm:
    """The algorithm expected to be the fastest for these shapes, for :func:`pack_conv_weight`.

    Args:
        input_shape: (N, C, spatial…) of one to three spatial axes.
        weight_shape: (O, C / groups, kernel…).
        stride, padding, dilation, groups, precision: as for :func:`conv2d`.
        dtype: of the tensors.
        exact: without Winograd, whose error is larger than that of the direct sum.
        channels_last: the layout of the result; "planes" is for images that are not.

    Raises:
        ValueError: shapes that are not those of a convolution, or an unknown precision.
    """
    op, axes = "conv_algorithm", len(weight_shape) - 2
    if not 1 <= axes <= 3 or len(input_shape) != axes + 2:
        raise ValueError(
            f"{op}: input_shape and weight_shape must have 3, 4 or 5 entries each, got "
            f"{tuple(input_shape)} and {tuple(weight_shape)}"
        )
    if groups < 1 or weight_shape[0] % groups or input_shape[1] != groups * weight_shape[1]:
        raise ValueError(
            f"{op}: groups must divide the output channels, and input must have groups times the "
            f"weight's channels, got groups = {groups}, {tuple(input_shape)} and "
            f"{tuple(weight_shape)}"
        )
    steps, spread = per_axis(op, "stride", stride, axes), per_axis(op, "dilation", dilation, axes)
    around = sides(op, padding, axes, (weight_shape[2:], steps, spread))
    _check_shapes(op, input_shape, weight_shape, steps, around, spread)
    bf16 = precision_code(precision) == 1 or dtype == torch.bfloat16
    x, w = list(input_shape), list(weight_shape)
    code = _native.conv_algorithm(x, w, steps, around, spread, groups, bf16, exact, channels_last)
    return next(name for name, known in ALGORITHMS.items() if known == code)


def _check_shapes(
    op: str,
    image: Sequence[int],
    weight: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    """That they leave at least a pixel, as the ops check it of tensors."""
    if min(*image, *weight) < 0 or min(*image[2:], *weight[2:]) < 1:
        raise ValueError(
            f"{op}: input_shape and weight_shape must have pixels and taps, got {tuple(image)} and "
            f"{tuple(weight)}"
        )
    for name, entries, least in (
        ("stride", stride, 1),
        ("padding", padding, 0),
        ("dilation", dilation, 1),
    ):
        if min(entries) < least:
            raise ValueError(f"{op}: {name} must be at least {least}, got {tuple(entries)}")
    for axis, size in enumerate(image[2:]):
        padded = size + padding[2 * axis] + padding[2 * axis + 1]
        reach = (weight[axis + 2] - 1) * dilation[axis] + 1
        if padded < reach:
            raise ValueError(
                f"{op}: the kernel reaches over {reach} pixels of an input of {padded} with its "
                f"padding: nothing is left, got {tuple(image)} and {tuple(weight)}"
            )


def pack_conv_weight(
    weight: Tensor,
    *,
    groups: int = 1,
    precision: Precision = "fp32",
    algorithm: PackedAlgorithm,
) -> Tensor:
    """A weight (O, C / groups, kernel…) in the layout that :func:`conv_packed` reads.

    Panels of 16 output channels, each a sequence of 64-byte groups, padded with zeros:

    - "direct": (groups·⌈O'/16⌉, taps·C', 16) float32, or (…, taps·⌈C'/2⌉, 32) bfloat16 with pairs
      of channels together; O' and C' are the channels of a group;
    - "direct_rows": the same with the taps of a kernel's row side by side, for few channels;
    - "winograd2", "winograd4": (groups·⌈O'/16⌉, 16·C' or 36·C', 16) float32, transformed:
      U = G g Gᵀ, computed in float32;
    - "depthwise": (⌈groups/16⌉, taps, 16) float32;
    - "planes": (⌈O/8⌉, C·taps, 8) float32, for few channels whose planes lie one by one.

    The layout is the same on every ISA tier, but not a file format: keep weights as torch stores
    them.

    Args:
        weight: (O, C / groups, kernel…) of one to three axes, float32, bfloat16 or float16.
        groups: divides O.
        precision: "fp32" or "bf16" (rounded to nearest even); a bfloat16 weight stays bfloat16.
        algorithm: the one that will read it; :func:`conv_algorithm` chooses.

    Raises:
        RuntimeError: a wrong dtype or shape, or one that the algorithm does not take.
        NotImplementedError: a forward-mode derivative.
        ValueError: an unknown precision or algorithm.
    """
    if forward_ad._current_level >= 0:
        refuse_forward_mode("pack_conv_weight", weight=weight)
    packed: Tensor = _pack_conv_weight(
        weight, groups, precision_code(precision), packed_algorithm_code(algorithm)
    )
    return packed


def conv_packed(
    input: Tensor,
    packed_weight: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    bias: Tensor | None = None,
    stride: Ints = 1,
    padding: Padding = 0,
    dilation: Ints = 1,
    groups: int = 1,
    *,
    algorithm: PackedAlgorithm,
    activation: ConvActivation = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
    channels_last: bool | None = None,
) -> Tensor:
    """Convolution with a weight packed by :func:`pack_conv_weight`; for inference.

    ``y = act(x * w + b + r)`` in one pass: bias, residual and activation are applied to the
    accumulators. Arguments as for :func:`conv2d`, over as many axes as ``kernel_size`` has entries;
    ``packed_weight``'s dtype chooses the products (float32 or bfloat16) and input may have any
    floating dtype beside it.

    Args:
        out_channels: O.
        kernel_size: one int an axis.
        algorithm: the one that the weight was packed for.
        channels_last: the layout of the result; None: input's.

    Numerics: as :func:`conv2d`, with one rounding at the end. Activations: error at most 3e-7·|x|.

    Raises:
        RuntimeError: a wrong dtype, shape or device, or a tensor that requires grad while gradients
            are recorded, naming the argument.
        ValueError: as :func:`conv2d`.
    """
    op = "conv_packed"
    refuse_derivative(op, input=input, bias=bias, residual=residual)
    kernel = list(kernel_size)
    axes = len(kernel)
    steps, spread = per_axis(op, "stride", stride, axes), per_axis(op, "dilation", dilation, axes)
    around = sides(op, padding, axes, (kernel, steps, spread))
    with_batch = batched(op, input, axes)
    if not with_batch:
        input = input.unsqueeze(0)
        residual = None if residual is None else residual.unsqueeze(0)
    y: Tensor = _conv_packed(
        input,
        packed_weight,
        out_channels,
        kernel,
        bias,
        residual,
        steps,
        around,
        spread,
        groups,
        activation_code(activation, CONV_ACTIVATIONS),
        negative_slope,
        packed_algorithm_code(algorithm),
        is_channels_last(input) if channels_last is None else channels_last,
    )
    return y if with_batch else y.squeeze(0)
