"""Linear layers in fp32 and bf16: y = act(x·Wᵀ + b) + r."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pybigmodel.ops import _checks as check
from pybigmodel.ops._autocast import register_autocast
from pybigmodel.ops._common import (
    Activation,
    Precision,
    activation_code,
    precision_code,
    refuse_gradient,
)
from pybigmodel.reference.linear import ACTIVATION_FUNCTIONS

_ops = torch.ops.pybigmodel
_linear = _ops.linear.default
_linear_backward = _ops.linear_backward.default
_linear_packed = _ops.linear_packed.default
_pack_linear_weight = _ops.pack_linear_weight.default


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
    precision: Precision = "fp32",
) -> Tensor:
    """Linear transformation with the weight as torch stores it; differentiable.

    ``y = act(x·Wᵀ + b) + r``. The weight is packed at every call, in cache-sized blocks: for a
    weight that changes every step. For one that stays, see :func:`linear_packed`.

    Args:
        input: (..., in_features), float32, bfloat16 or float16, any strides.
        weight: (out_features, in_features), input's dtype.
        bias: (out_features,), input's dtype or float32.
        activation: "none", "relu", "gelu" (erf), "gelu_tanh" or "silu".
        residual: the output's shape and dtype, added last.
        precision: "fp32", or "bf16": products of operands rounded to bfloat16, summed in fp32.
            bfloat16 tensors always take the latter.

    Returns:
        (..., out_features), input's dtype.

    Numerics: fp32 accumulation, in blocks of 256 terms (512 in bf16); one rounding to the output's
    dtype. Under autograd, activation and residual run as torch ops on the rounded product.
    bfloat16 products treat subnormals as zero on the avx512_bf16 tier.

    Raises:
        RuntimeError: a wrong dtype, shape or device, naming the argument; a second derivative.
        ValueError: an unknown activation or precision.

    Source: Georganas et al., "High-Performance Deep Learning via a Single Building Block", 2020.
    """
    y: Tensor = _linear(input, weight, bias, precision_code(precision))
    if activation_code(activation):
        y = ACTIVATION_FUNCTIONS[activation](y)
    return y if residual is None else y + residual


def linear_packed(
    input: Tensor,
    packed_weight: Tensor,
    out_features: int,
    bias: Tensor | None = None,
    *,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Linear transformation with a weight packed by :func:`pack_linear_weight`; for inference.

    ``y = act(x·Wᵀ + b) + r`` in one pass: bias, activation and residual are applied to the
    accumulators. Arguments as for :func:`linear`; ``packed_weight``'s dtype chooses the products
    (float32 or bfloat16) and input may have any floating dtype beside it.

    Numerics: fp32 accumulation in blocks of 256 terms (512 in bf16), one rounding at the end.
    Activations: error at most 3e-7·|x|; relative 1.5e-6 for GELU at x ≥ −3, 5e-7 for SiLU at
    x ≥ −88.

    Raises:
        RuntimeError: a wrong dtype, shape or device, or a tensor that requires grad while gradients
            are recorded, naming the argument.
    """
    if torch.is_grad_enabled():
        refuse_gradient("linear_packed", input=input, bias=bias, residual=residual)
    y: Tensor = _linear_packed(
        input, packed_weight, out_features, bias, residual, activation_code(activation)
    )
    return y


def pack_linear_weight(weight: Tensor, precision: Precision = "fp32") -> Tensor:
    """A weight (out_features, in_features) in the layout that :func:`linear_packed` reads.

    Panels of 16 output features, each a sequence of 64-byte groups: (⌈N/16⌉, K, 16) float32, or
    (⌈N/16⌉, ⌈K/2⌉, 32) bfloat16 with pairs of k together. The layout is the same on every ISA tier,
    but not a file format: keep weights as torch stores them.

    Args:
        weight: (out_features, in_features), float32, bfloat16 or float16.
        precision: "fp32" or "bf16" (rounded to nearest even).
    """
    packed: Tensor = _pack_linear_weight(weight, precision_code(precision))
    return packed


# --- fake kernels -------------------------------------------------------------------------------


@torch.library.register_fake("pybigmodel::linear")
def _linear_fake(input: Tensor, weight: Tensor, bias: Tensor | None, precision: int) -> Tensor:
    op = "linear"
    check.check_weight(op, input, weight)
    check.check_bias(op, input, weight.shape[0], bias)
    check.check_range(op, "precision", precision, 2)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


@torch.library.register_fake("pybigmodel::linear_backward")
def _linear_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    precision: int,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "linear_backward"
    check.check_weight(op, input, weight)
    check.check_like_output(op, "grad_output", grad_output, input, weight.shape[0])
    check.check_range(op, "precision", precision, 2)
    return (
        input.new_empty(input.shape if need_input else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        input.new_empty((weight.shape[0],) if need_bias else (0,), dtype=torch.float32),
    )


@torch.library.register_fake("pybigmodel::pack_linear_weight")
def _pack_linear_weight_fake(weight: Tensor, precision: int) -> Tensor:
    op = "pack_linear_weight"
    check.check_float(op, "weight", weight)
    check.check_dim(op, "weight", weight, 2)
    check.check_range(op, "precision", precision, 2)
    n, k = weight.shape
    per_lane = 2 if precision else 1
    return weight.new_empty(
        (check.ceil_div(n, check.PANEL), check.ceil_div(k, per_lane), check.PANEL * per_lane),
        dtype=torch.bfloat16 if precision else torch.float32,
    )


@torch.library.register_fake("pybigmodel::linear_packed")
def _linear_packed_fake(
    input: Tensor,
    packed_weight: Tensor,
    out_features: int,
    bias: Tensor | None,
    residual: Tensor | None,
    activation: int,
) -> Tensor:
    op = "linear_packed"
    check.check_input(op, input)
    check.check_dtype(op, "packed_weight", packed_weight, torch.float32, torch.bfloat16)
    per_lane = 1 if packed_weight.dtype == torch.float32 else 2
    n, k = out_features, input.shape[-1]
    groups = check.ceil_div(k, per_lane)
    check.check_packed(op, packed_weight, input, groups, check.PANEL * per_lane, n)
    check.check_bias(op, input, n, bias)
    check.check_like_output(op, "residual", residual, input, n)
    check.check_range(op, "activation", activation, check.ACTIVATION_COUNT)
    return input.new_empty((*input.shape[:-1], n))


# --- autograd -----------------------------------------------------------------------------------


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    input, weight, bias, precision = inputs
    ctx.save_for_backward(input, weight)
    ctx.precision = precision
    ctx.bias_dtype = None if bias is None else bias.dtype


def _backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    need_input, need_weight, need_bias, _ = ctx.needs_input_grad
    grad_input, grad_weight, grad_bias = _linear_backward(
        grad_output, input, weight, ctx.precision, need_input, need_weight, need_bias
    )
    return (
        grad_input if need_input else None,
        grad_weight if need_weight else None,
        grad_bias.to(ctx.bias_dtype) if need_bias else None,
        None,
    )


torch.library.register_autograd("pybigmodel::linear", _backward, setup_context=_setup_context)


def _no_second_gradient(ctx: Any, *grad_outputs: Tensor) -> None:
    raise RuntimeError("pybigmodel.ops.linear: the gradient of its gradient is not implemented")


torch.library.register_autograd("pybigmodel::linear_backward", _no_second_gradient)

# --- autocast: all but packed weights, whose dtype chooses the products --------------------------

register_autocast("linear", (0, 1, 2))
register_autocast("linear_packed", (0, 3, 4))
