"""A linear layer and the activation behind it, in one pass where that is the same."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pybigmodel._torch_private import hooked_everywhere
from pybigmodel.nn.int8_linear import Int8Linear
from pybigmodel.nn.linear import Linear
from pybigmodel.ops._common import Activation

_FUNCTIONS: dict[Any, Activation] = {
    F.relu: "relu",
    torch.relu: "relu",
    F.gelu: "gelu",
    F.silu: "silu",
}
_MODULES: dict[type[nn.Module], Activation] = {nn.ReLU: "relu", nn.SiLU: "silu"}
# transformers.activations, which need not be installed.
_TRANSFORMERS: dict[str, Activation] = {
    "SiLUActivation": "silu",
    "NewGELUActivation": "gelu_tanh",
    "FastGELUActivation": "gelu_tanh",
}


def activated(activation: Callable[[Any], Any], layer: Callable[[Any], Any], x: Any) -> Any:
    """``activation(layer(x))``, in one pass where both are known and nobody looks on."""
    if (
        (type(layer) is Linear or type(layer) is Int8Linear)
        and not torch.compiler.is_compiling()
        and not hooked(layer)
        and not hooked_everywhere()
    ):
        name = activation_of(activation)
        if name is not None:
            return layer.with_activation(x, name)
    return activation(layer(x))


def activation_of(function: Any) -> Activation | None:
    """Its name, if the products know it and calling it does nothing else."""
    if not isinstance(function, nn.Module):
        # Not by hash, which a callable may lack.
        return next((name for known, name in _FUNCTIONS.items() if known is function), None)
    if hooked(function):
        return None
    kind = type(function)
    if kind is nn.GELU:
        return "gelu" if function.approximate == "none" else "gelu_tanh"
    if kind.__module__ != "transformers.activations":
        return _MODULES.get(kind)
    if kind.__name__ in ("GELUActivation", "GELUTanh"):
        return _gelu_of(function.act)
    return _TRANSFORMERS.get(kind.__name__)


def _gelu_of(function: Any) -> Activation | None:
    """Of what transformers' GELUs hold and call: torch's, or their own of the same formula."""
    if function is F.gelu:
        return "gelu"
    tanh = isinstance(function, functools.partial) and function.func is F.gelu
    return "gelu_tanh" if tanh and function.keywords == {"approximate": "tanh"} else None


def hooked(module: nn.Module) -> bool:
    """Whether calling the module does more than its class's forward."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in vars(module)
    )
