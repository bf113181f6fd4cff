"""Linear layers in fp32 and bf16: y = act(x·Wᵀ + b) + r."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_dynamo_compiling

from pybigmodel._torch_private import applied, below_autograd, forward_ad, register_function
from pybigmodel.ops import _checks as check
from pybigmodel.ops._autocast import cast, register_autocast
from pybigmodel.ops._common import (
    Activation,
    ForwardModeError,
    Precision,
    activation_code,
    precision_code,
    refuse_derivative,
    refuse_forward_mode,
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
        NotImplementedError: a forward-mode derivative.
        ValueError: an unknown activation or precision.

    Source: Georganas et al., "High-Performance Deep Learning via a Single Building Block", 2020.
    """
    if forward_ad._current_level >= 0:
        refuse_forward_mode("linear", input=input, weight=weight, bias=bias)
    y: Tensor
    code = precision_code(precision)
    if torch.is_grad_enabled() or is_dynamo_compiling():
        y = _linear(input, weight, bias, code)
    else:
        y = below_autograd(_linear, input, weight, bias, code)
    if activation_code(activation):
        y = ACTIVATION_FUNCTIONS[activation](y)
    if residual is None:
        return y
    device = y.device.type
    if torch.is_autocast_enabled(device):
        residual = cast(residual, device, y.dtype)
    if residual.shape != y.shape or residual.dtype != y.dtype:  # Dynamo follows it, not _checks
        raise RuntimeError(
            f"linear: residual must be {check.name_of(y.dtype)} of the output's shape "
            f"{tuple(y.shape)}, got {check.name_of(residual.dtype)} of shape "
            f"{tuple(residual.shape)}"
        )
    return y + residual


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
    (float32 or bfloat16) and input may have any floating dtype beside it. A bfloat16 one holds
    pairs of k, so that input's width is checked up to a multiple of two.

    Numerics: fp32 accumulation in blocks of 256 terms (512 in bf16), one rounding at the end.
    Activations: error at most 3e-7·|x|; relative 1.5e-6 for GELU at x ≥ −3, 5e-7 for SiLU at
    x ≥ −88.

    Raises:
        RuntimeError: a wrong dtype, shape or device, or a tensor that requires grad while gradients
            are recorded, naming the argument.
    """
    refuse_derivative("linear_packed", input=input, bias=bias, residual=residual)
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
        precision: "fp32" or "bf16" (rounded to nearest even); a bfloat16 weight stays bfloat16.
    """
    if forward_ad._current_level >= 0:
        refuse_forward_mode("pack_linear_weight", weight=weight)
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
    bf16 = precision == 1 or weight.dtype == torch.bfloat16
    per_lane = 2 if bf16 else 1
    return weight.new_empty(
        (check.ceil_div(n, check.PANEL), check.ceil_div(k, per_lane), check.PANEL * per_lane),
        dtype=torch.bfloat16 if bf16 else torch.float32,
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


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(input: Tensor, weight: Tensor, bias: Tensor | None, precision: int) -> Tensor:
        y: Tensor = below_autograd(_linear, input, weight, bias, precision)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, bias, ctx.precision = inputs
        need_input, need_weight, *_ = ctx.needs_input_grad
        # Beside a frozen weight no activation is kept, and beside raw input no weight.
        ctx.save_for_backward(input if need_weight else None, weight if need_input else None)
        ctx.bias_dtype = None if bias is None else bias.dtype

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        need_input, need_weight, need_bias, *_ = ctx.needs_input_grad
        input, weight = _in_place_of_missing(grad_output, *ctx.saved_tensors)
        grad_input, grad_weight, grad_bias = _linear_backward(
            grad_output, input, weight, ctx.precision, need_input, need_weight, need_bias
        )
        return (
            grad_input if need_input else None,
            grad_weight if need_weight else None,
            grad_bias.to(ctx.bias_dtype) if need_bias else None,
            None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise ForwardModeError("linear: forward-mode derivatives are not implemented")


class _LinearFromPacked(_Linear):
    """With a packed copy of the weight, which stays the one that is differentiated."""

    @staticmethod
    def forward(  # type: ignore[override]
        input: Tensor, weight: Tensor, bias: Tensor | None, precision: int, packed: Tensor
    ) -> Tensor:
        y: Tensor = below_autograd(_linear_packed, input, packed, weight.shape[0], bias, None, 0)
        return y

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _Linear.setup_context(ctx, inputs[:4], output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*_Linear.backward(ctx, *grads), None)


linear_from_packed = applied(_LinearFromPacked)


def _in_place_of_missing(
    grad_output: Tensor, input: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor]:
    """For an operand that no gradient needs, a row that stands for all: linear_backward checks
    shapes, and reads what it needs."""
    rows, n = grad_output.shape[:-1], grad_output.shape[-1]
    k = 1 if input is None and weight is None else (weight if input is None else input).shape[-1]  # type: ignore[union-attr]
    row = grad_output.new_empty(k)
    return (
        row.expand(*rows, k) if input is None else input,
        row.expand(n, k) if weight is None else weight,
    )


class _LinearBackward(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        grads: tuple[Tensor, Tensor, Tensor] = below_autograd(_linear_backward, *args)
        return grads

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("pybigmodel.ops.linear: the gradient of its gradient is not implemented")

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise ForwardModeError("linear: forward-mode derivatives are not implemented")


_library = torch.library.Library("pybigmodel", "IMPL")
register_function(_library, _linear, _Linear)
register_function(_library, _linear_backward, _LinearBackward)

# --- autocast: all but packed weights, whose dtype chooses the products --------------------------

register_autocast("linear", (0, 1, 2))
register_autocast("linear_packed", (0, 3, 4))
