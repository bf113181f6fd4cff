"""Linear layers in fp32 and bf16: y = act(x·Wᵀ + b) + r."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pybigmodel.ops._autocast import register_autocast
from pybigmodel.ops._common import (
    FLOAT_DTYPES,
    PANEL,
    Activation,
    Precision,
    activation_code,
    ceil_div,
    check_epilogue,
    check_input,
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
    GELU and SiLU: relative error below 1e-6 of the fp32 result.

    Raises:
        RuntimeError: a wrong dtype, shape or device, or a tensor that requires grad while gradients
            are recorded, naming the argument.
    """
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
    _check_linear("linear", input, weight)
    check_epilogue("linear", input, weight.shape[0], bias, None)
    return input.new_empty((*input.shape[:-1], weight.shape[0]))


def _check_linear(op: str, input: Tensor, weight: Tensor) -> None:
    check_input(op, input)
    torch._check(weight.dim() == 2, lambda: f"{op}: weight must have 2 dimensions")
    torch._check(
        weight.dtype == input.dtype,
        lambda: f"{op}: weight must be {input.dtype}, got {weight.dtype}",
    )
    torch._check(
        input.shape[-1] == weight.shape[1],
        lambda: (
            f"{op}: input's last dimension must be in_features = {weight.shape[1]}, "
            f"got input of shape {tuple(input.shape)}"
        ),
    )


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
    _check_linear("linear_backward", input, weight)
    return (
        input.new_empty(input.shape if need_input else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        input.new_empty((weight.shape[0],) if need_bias else (0,)),
    )


@torch.library.register_fake("pybigmodel::pack_linear_weight")
def _pack_linear_weight_fake(weight: Tensor, precision: int) -> Tensor:
    op = "pack_linear_weight"
    torch._check(weight.dim() == 2, lambda: f"{op}: weight must have 2 dimensions")
    torch._check(
        weight.dtype in FLOAT_DTYPES,
        lambda: f"{op}: weight must be float32, bfloat16 or float16, got {weight.dtype}",
    )
    n, k = weight.shape
    per_lane = 2 if precision else 1
    return weight.new_empty(
        (ceil_div(n, PANEL), ceil_div(k, per_lane), PANEL * per_lane),
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
    check_input(op, input)
    torch._check(packed_weight.dim() == 3, lambda: f"{op}: packed_weight must have 3 dimensions")
    torch._check(
        packed_weight.dtype in (torch.float32, torch.bfloat16),
        lambda: f"{op}: packed_weight must be float32 or bfloat16, got {packed_weight.dtype}",
    )
    per_lane = 1 if packed_weight.dtype == torch.float32 else 2
    torch._check(
        packed_weight.shape[0] == ceil_div(out_features, PANEL),
        lambda: f"{op}: packed_weight does not hold out_features = {out_features}",
    )
    torch._check(
        packed_weight.shape[1] == ceil_div(input.shape[-1], per_lane),
        lambda: f"{op}: packed_weight does not hold in_features = {input.shape[-1]}",
    )
    check_epilogue(op, input, out_features, bias, residual)
    return input.new_empty((*input.shape[:-1], out_features))


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
