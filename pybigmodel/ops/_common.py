"""What the families of ops share: names of enums, checks of fake kernels, packed shapes."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Activation: TypeAlias = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]
Precision: TypeAlias = Literal["fp32", "bf16"]

ACTIVATIONS: dict[str, int] = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
PRECISIONS: dict[str, int] = {"fp32": 0, "bf16": 1}

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PANEL = 16  # columns of a packed panel
GROUP_BYTES = 64  # bytes of one group of k in a panel
MAX_INT8_K = 65793  # 255 · 128 · K < 2³¹


def activation_code(activation: str) -> int:
    try:
        return ACTIVATIONS[activation]
    except KeyError:
        names = ", ".join(ACTIVATIONS)
        raise ValueError(f"activation must be one of {names}; got {activation!r}") from None


def precision_code(precision: str) -> int:
    try:
        return PRECISIONS[precision]
    except KeyError:
        raise ValueError(f"precision must be 'fp32' or 'bf16'; got {precision!r}") from None


def ceil_div(a: int, b: int) -> int:
    return (a + b - 1) // b


def check_input(op: str, input: Tensor) -> None:
    torch._check(
        input.dtype in FLOAT_DTYPES,
        lambda: f"{op}: input must be float32, bfloat16 or float16, got {input.dtype}",
    )
    torch._check(
        input.dim() >= 1, lambda: f"{op}: input must have at least 1 dimension, got a scalar"
    )


def check_epilogue(
    op: str, input: Tensor, n: int, bias: Tensor | None, residual: Tensor | None
) -> None:
    if bias is not None:
        torch._check(bias.dim() == 1, lambda: f"{op}: bias must have shape ({n},)")
        torch._check(bias.shape[0] == n, lambda: f"{op}: bias must have shape ({n},)")
        torch._check(
            bias.dtype in (input.dtype, torch.float32),
            lambda: f"{op}: bias must be {input.dtype} as input is, or float32; got {bias.dtype}",
        )
    if residual is not None:
        torch._check(
            residual.dtype == input.dtype,
            lambda: f"{op}: residual must be {input.dtype}, got {residual.dtype}",
        )
        torch._check(
            residual.dim() == input.dim(),
            lambda: f"{op}: residual must have the output's shape, got {tuple(residual.shape)}",
        )
        for got, expected in zip(residual.shape, (*input.shape[:-1], n), strict=True):
            torch._check(
                got == expected,
                lambda: f"{op}: residual must have the output's shape, got {tuple(residual.shape)}",
            )


def refuse_gradient(op: str, **tensors: Tensor | None) -> None:
    """An op for inference must not be where a gradient silently ends."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{op}: {name} requires grad, and this op has no gradient: call it under "
                    "torch.no_grad(), or detach the tensor; pybigmodel.ops.linear is differentiable"
                )
