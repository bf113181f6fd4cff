"""What the families of ops share: names of enums, the refusal of derivatives."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pybigmodel._torch_private import below_autograd, forward_ad, is_dual

Activation: TypeAlias = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]
ConvActivation: TypeAlias = Activation | Literal["relu6", "hardswish", "leaky_relu"]
Precision: TypeAlias = Literal["fp32", "bf16"]

ACTIVATIONS: dict[str, int] = {"none": 0, "relu": 1, "gelu": 2, "gelu_tanh": 3, "silu": 4}
CONV_ACTIVATIONS: dict[str, int] = {**ACTIVATIONS, "relu6": 5, "hardswish": 6, "leaky_relu": 7}
PRECISIONS: dict[str, int] = {"fp32": 0, "bf16": 1}


def activation_code(activation: str, known: dict[str, int] = ACTIVATIONS) -> int:
    try:
        return known[activation]
    except (KeyError, TypeError):  # the latter: a list, say
        names = ", ".join(known)
        raise ValueError(f"activation must be one of {names}; got {activation!r}") from None


def precision_code(precision: str) -> int:
    try:
        return PRECISIONS[precision]
    except (KeyError, TypeError):  # the latter: a list, say
        raise ValueError(f"precision must be 'fp32' or 'bf16'; got {precision!r}") from None


def refuse_derivative(op: str, **tensors: Tensor | None) -> None:
    """For an op of inference while derivatives are recorded: none may silently end in it."""
    if torch.is_grad_enabled():
        for name, tensor in tensors.items():
            if tensor is not None and tensor.requires_grad:
                raise RuntimeError(
                    f"{op}: {name} requires grad, and this op has no gradient: call it under "
                    f"torch.no_grad(), or detach the tensor; {_differentiable(op)} is "
                    "differentiable"
                )
    if forward_ad._current_level >= 0:
        refuse_forward_mode(op, **tensors)


def _differentiable(op: str) -> str:
    """What to call instead."""
    if "_pool" in op:
        return f"torch.nn.functional.{op}"
    family = op.removeprefix("int8_").partition("_")[0]
    other = {"attention": "attention", "conv": "conv2d"}.get(family, "linear")
    return f"pybigmodel.ops.{other}"


class ForwardModeError(NotImplementedError):
    """Forward-mode differentiation, which no op has."""


def refuse_forward_mode(op: str, **tensors: Tensor | None) -> None:
    """Within a level of forward-mode differentiation: no tangent may silently become zero."""
    for name, tensor in tensors.items():
        if is_dual(tensor):
            raise ForwardModeError(
                f"{op}: {name} is a dual tensor, and forward-mode derivatives are not implemented"
            )


def once_differentiable(op: Any, name: str) -> type[torch.autograd.Function]:
    """The autograd of the op that is the backward of ``name``: there is none."""

    class Backward(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Any:
            return below_autograd(op, *args)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            pass

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> None:
            raise RuntimeError(
                f"pybigmodel.ops.{name}: the gradient of its gradient is not implemented"
            )

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> None:
            raise ForwardModeError(f"{name}: forward-mode derivatives are not implemented")

    return Backward


def has_width(input: Tensor, in_features: int) -> bool:
    """Whether a layer may take the input, or an op must say why not: a nested one has no shape."""
    return input.is_nested or input.shape[-1:] == (in_features,)


def no_kernel(layer: str, substitute: str, **tensors: Tensor | None) -> NotImplementedError:
    """What to raise where torch found no kernel for the layer's op."""
    got = ", ".join(
        f"{name} a {'nested ' * tensor.is_nested}{type(tensor).__qualname__} "
        f"({tensor.layout}, {tensor.device})"
        for name, tensor in tensors.items()
        if tensor is not None
    )
    return NotImplementedError(f"pybigmodel.nn.{layer} has no kernel for {got}; {substitute}")
