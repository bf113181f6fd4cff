"""Turning a module into another kind of layer and back while it stays the same object.

The object keeps its identity, so its hooks, its names, what else refers to it and what the user
attached to it need no moving, and a root module can be swapped too. torch's parametrizations swap
classes in the same way.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pybigmodel.nn import Int8Linear, Linear

# Of the attributes that every module has, these hold tensors; the others are hooks and the mode.
_TENSORS = ("_parameters", "_buffers", "_non_persistent_buffers_set")
_KEPT = frozenset(vars(nn.Module())) - set(_TENSORS)
# On a swapped module: the float layer for `restore`, out of reach of parameters() and state_dict().
ORIGINAL = "_original"


def become(module: nn.Linear, new: Linear | Int8Linear, keep_original: bool) -> None:
    """Turn `module`, a torch.nn.Linear, into what `new` is."""
    original = _shell(module)
    state = {name: value for name, value in vars(new).items() if name not in _KEPT}
    vars(module).update(state)
    vars(module)[ORIGINAL] = original if isinstance(new, Int8Linear) else None
    module.__class__ = type(new)  # type: ignore[assignment]
    if isinstance(module, Int8Linear) and not keep_original:
        module._free_original()


def is_swapped(module: nn.Module) -> bool:
    return ORIGINAL in vars(module)


def why_not_reverted(module: nn.Module) -> str | None:
    """Why `revert` cannot be: the class was changed since, as parametrizations do."""
    kind = type(module)
    if kind in (Linear, Int8Linear):
        return None
    return (
        f"it became a {kind.__module__}.{kind.__qualname__} since; remove its parametrizations "
        "first (torch.nn.utils.parametrize.remove_parametrizations)"
    )


def revert(module: nn.Module) -> None:
    """Turn a swapped module into the torch.nn.Linear again that it was, with the bias it has now.

    Where the float weight was not kept, it is the one that the int8 layer computes with.
    """
    if isinstance(module, Linear):
        module.forget_packed()
    if isinstance(module, Int8Linear):
        original = vars(module)[ORIGINAL]
        if original is None or original.weight.numel() == 0:
            original = _dequantized(module, original)
        _update_bias(original, module.bias)
        for name in _TENSORS:
            vars(module)[name] = vars(original)[name]
    for name in ("_packed", "_precision", "weight_only", "symmetric", ORIGINAL):
        vars(module).pop(name, None)
    module.__class__ = nn.Linear


def _update_bias(linear: nn.Linear, bias: Tensor | None) -> None:
    """The int8 layer's may have been edited, or loaded."""
    if bias is None or linear.bias is None:
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    else:
        with torch.inference_mode(linear.bias.is_inference()), torch.no_grad():
            linear.bias.copy_(bias)


def _dequantized(module: Int8Linear, empty: nn.Linear | None) -> nn.Linear:
    linear = nn.Linear(module.in_features, module.out_features, device="meta")
    bias = module.bias
    if empty is not None:
        dtype, trained = empty.weight.dtype, empty.weight.requires_grad
        linear._parameters.update(empty._parameters)
    else:  # from a pickle
        dtype, trained = torch.float32 if bias is None else bias.dtype, True
        linear.register_parameter("bias", None)
    linear.weight = nn.Parameter(module.dequantized_weight().to(dtype), trained)
    return linear


def _shell(linear: nn.Module) -> nn.Linear:
    """A layer of its own on the same Parameter objects."""
    assert isinstance(linear, nn.Linear)
    shell = nn.Linear(linear.in_features, linear.out_features, device="meta")
    shell._parameters.update(linear._parameters)
    shell.training = linear.training
    return shell


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the weight in every form: as torch stores it, packed, quantised, kept."""
    if isinstance(module, Int8Linear):
        kept = vars(module).get(ORIGINAL)
        held = [module.packed_weight, module.weight_scale, *([] if kept is None else [kept.weight])]
        return sum(tensor.nbytes for tensor in held)
    assert isinstance(module, nn.Linear)
    if not isinstance(module, Linear):
        return module.weight.nbytes
    bf16 = module.precision == "bf16" or module.weight.dtype == torch.bfloat16
    n, k = -(-module.out_features // 16) * 16, module.in_features
    return module.weight.nbytes + (n * (k + k % 2) * 2 if bf16 else n * k * 4)
