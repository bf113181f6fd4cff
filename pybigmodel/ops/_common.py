"""What the families of ops share: names of enums, the refusal of gradients."""

from __future__ import annotations

from typing import Literal, TypeAlias

from torch import Tensor

Activation: TypeAlias = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]
Precision: TypeAlias = Literal["fp32", "bf16"]

ACTIVATIONS: dict[str, int] = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
PRECISIONS: dict[str, int] = {"fp32": 0, "bf16": 1}


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


def refuse_gradient(op: str, **tensors: Tensor | None) -> None:
    """For an op of inference while gradients are recorded: none may silently end in it."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.requires_grad:
            raise RuntimeError(
                f"{op}: {name} requires grad, and this op has no gradient: call it under "
                "torch.no_grad(), or detach the tensor; pybigmodel.ops.linear is differentiable"
            )
