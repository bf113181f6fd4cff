"""Linear layers with int8 weights: dynamic int8 activations, or weights only."""

from __future__ import annotations

import torch
from torch import Tensor

from pybigmodel._torch_private import forward_ad
from pybigmodel.ops import _checks as check
from pybigmodel.ops._autocast import register_autocast
from pybigmodel.ops._common import (
    Activation,
    activation_code,
    refuse_derivative,
    refuse_forward_mode,
)

_ops = torch.ops.pybigmodel
_quantize_per_token = _ops.quantize_per_token.default
_pack_int8_linear_weight = _ops.pack_int8_linear_weight.default
_int8_linear = _ops.int8_linear.default
_int8_weight_only_linear = _ops.int8_weight_only_linear.default


def quantize_per_token(input: Tensor, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the last dimension to integers: x ≈ s·(q − z), one s and z a row.

    Symmetric: q in [−127, 127] (int8), s = max|x|/127, z = 0. Asymmetric: q in [0, 255] (uint8),
    s = (max − min)/255 over the range that holds zero, z = round(−min/s).

    Args:
        input: (..., k), float32, bfloat16 or float16.
        symmetric: whether zero points are wanted to be zero.

    Returns:
        q (..., k) int8 or uint8; scale (...) float32; zero_point (...) int32.

    Numerics: rounding to nearest even, |x − s·(q − z)| ≤ s/2 (at the range's ends ≤ s). A row of
    zeros has s = 1; a row with NaN or infinity has s = NaN: what is computed from it is NaN.

    Raises:
        RuntimeError: input is not floating or has no dimension.
    """
    if forward_ad._current_level >= 0:
        refuse_forward_mode("quantize_per_token", input=input)
    q, scale, zero_point = _quantize_per_token(input, symmetric)
    return q, scale, zero_point


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight to int8 per output channel: w ≈ s_n·q, q in [−127, 127].

    Args:
        weight: (N, K) of a linear layer, or (O, C, kernel…) of a convolution, floating.

    Returns:
        q of weight's shape, int8; scale (N,) or (O,), float32; |w − s·q| ≤ s/2.

    Raises:
        ValueError: the weight is not floating or has other dimensions, or NaN or infinity in it.
    """
    if not 2 <= weight.dim() <= 5 or weight.dtype not in check.FLOAT_DTYPES:
        raise ValueError(
            "quantize_weight: weight must be float32, bfloat16 or float16 with 2 to 5 dimensions, "
            f"got {weight.dtype} of shape {tuple(weight.shape)}"
        )
    rows = weight.detach().flatten(1)
    q, scale, _ = quantize_per_token(rows, symmetric=True)
    bad = scale.isnan().nonzero()
    if bad.numel():
        raise ValueError(
            f"quantize_weight: weight has NaN or infinity in {bad.shape[0]} of its rows, "
            f"the first being row {int(bad[0])}"
        )
    return q.view(weight.shape), scale


def pack_int8_linear_weight(weight: Tensor) -> Tensor:
    """An int8 weight (N, K) in the layout that the int8 ops read: (⌈N/16⌉, ⌈K/4⌉ + 1, 64) int8.

    Panels of 16 output features, each a sequence of 64-byte groups with 4 consecutive k a feature;
    the last group of a panel holds the int32 sums of its columns, which zero points need.

    Raises:
        RuntimeError: weight is not an int8 matrix, or K > 65793 (int32 sums could overflow).
    """
    packed: Tensor = _pack_int8_linear_weight(weight)
    return packed


def int8_linear(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """Linear transformation in int8 with activations quantised on the way; for inference.

    ``y = act(s_row·s_n·Σ_k (q − z_row)·w + b) + r``, where q, s_row and z_row come from
    :func:`quantize_per_token`, inside the op.

    Args:
        input: (..., in_features), float32, bfloat16 or float16, any strides. The packed weight
            holds groups of four k, so that its width is checked up to a multiple of four.
        packed_weight: from :func:`pack_int8_linear_weight`.
        weight_scale: (out_features,) float32.
        bias: (out_features,), input's dtype or float32.
        activation: "none", "relu", "gelu" (erf), "gelu_tanh" or "silu".
        residual: the output's shape and dtype, added last.
        symmetric: quantise activations to [−127, 127] instead of [0, 255] with a zero point.

    Returns:
        (..., out_features), input's dtype.

    Numerics: integer sums are exact (int32, in_features ≤ 65793); everything after them is fp32.
    A row of input with NaN or infinity gives NaN.

    Raises:
        RuntimeError: a wrong dtype, shape or device, or a tensor that requires grad while gradients
            are recorded, naming the argument.
    """
    refuse_derivative("int8_linear", input=input, bias=bias, residual=residual)
    y: Tensor = _int8_linear(
        input,
        packed_weight,
        weight_scale,
        bias,
        residual,
        activation_code(activation),
        symmetric,
    )
    return y


def int8_weight_only_linear(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Linear transformation with int8 weights and activations as they are; for inference.

    ``y = act(s_n·Σ_k x·w + b) + r``. For few rows (decoding), where reading the weight is the cost.
    Arguments as for :func:`int8_linear`.

    Numerics: on the CPU each row of input becomes 24-bit fixed point relative to its largest
    magnitude, |error| ≤ 2⁻²³·max|x| an element, and the integer sums are exact. The error
    is that of an fp32 product unless one element dwarfs its row: then it was 5 to 24 times that, at
    most 6e-6 (docs/numerics.md). A row with NaN or infinity gives NaN.

    Raises:
        RuntimeError: a wrong dtype, shape or device, or a tensor that requires grad while gradients
            are recorded, naming the argument.
    """
    refuse_derivative("int8_weight_only_linear", input=input, bias=bias, residual=residual)
    y: Tensor = _int8_weight_only_linear(
        input, packed_weight, weight_scale, bias, residual, activation_code(activation)
    )
    return y


# --- fake kernels -------------------------------------------------------------------------------


@torch.library.register_fake("pybigmodel::quantize_per_token")
def _quantize_per_token_fake(input: Tensor, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    check.check_input("quantize_per_token", input)
    return (
        input.new_empty(input.shape, dtype=torch.int8 if symmetric else torch.uint8),
        input.new_empty(input.shape[:-1], dtype=torch.float32),
        input.new_empty(input.shape[:-1], dtype=torch.int32),
    )


@torch.library.register_fake("pybigmodel::pack_int8_linear_weight")
def _pack_int8_linear_weight_fake(weight: Tensor) -> Tensor:
    op = "pack_int8_linear_weight"
    check.check_dtype(op, "weight", weight, torch.int8)
    check.check_dim(op, "weight", weight, 2)
    n, k = weight.shape
    check.check_int8_k(op, k)
    return weight.new_empty(
        (check.ceil_div(n, check.PANEL), check.ceil_div(k, 4) + 1, check.GROUP_BYTES)
    )


def _product_fake(
    op: str,
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> Tensor:
    check.check_input(op, input)
    check.check_dtype(op, "packed_weight", packed_weight, torch.int8)
    check.check_dtype(op, "weight_scale", weight_scale, torch.float32)
    check.check_dim(op, "weight_scale", weight_scale, 1)
    check.check_same_device(op, "weight_scale", weight_scale, input)
    n, k = weight_scale.shape[0], input.shape[-1]
    check.check_int8_k(op, k)
    groups = check.ceil_div(k, 4) + 1
    source = " (the size of weight_scale)"
    check.check_packed(op, packed_weight, input, groups, check.GROUP_BYTES, n, source)
    check.check_bias(op, input, n, bias)
    check.check_like_output(op, "residual", residual, input, n)
    check.check_range(op, "activation", activation, check.ACTIVATION_COUNT)
    return input.new_empty((*input.shape[:-1], n))


@torch.library.register_fake("pybigmodel::int8_linear")
def _int8_linear_fake(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
    symmetric: bool,
) -> Tensor:
    op = "int8_linear"
    return _product_fake(op, input, packed_weight, weight_scale, bias, residual, activation)


@torch.library.register_fake("pybigmodel::int8_weight_only_linear")
def _int8_weight_only_linear_fake(
    input: Tensor,
    packed_weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> Tensor:
    op = "int8_weight_only_linear"
    return _product_fake(op, input, packed_weight, weight_scale, bias, residual, activation)


# --- autocast: all but the weight's scales, which stay float32 -----------------------------------

register_autocast("int8_linear", (0, 3, 4))
register_autocast("int8_weight_only_linear", (0, 3, 4))
