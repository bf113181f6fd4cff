"""Turning a module into another kind of layer and back while it stays the same object.

The object keeps its identity, so its hooks, its names, what else refers to it and what the user
attached to it need no moving, and a root module can be swapped too. torch's parametrizations swap
classes in the same way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pybigmodel._fuse import GROUPED, Fused, fused_class
from pybigmodel.nn import (
    Linear,
    MultiheadAttention,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)
from pybigmodel.nn._int8_layer import Int8Layer
from pybigmodel.nn.conv import CONVOLUTIONS, STATE
from pybigmodel.nn.int8_conv import INT8_CONVOLUTIONS, INT8_STATE
from pybigmodel.nn.int8_linear import Int8Linear
from pybigmodel.nn.multihead_attention import WEIGHTS
from pybigmodel.nn.pool import POOLS
from pybigmodel.ops._checks import PANEL, ceil_div
from pybigmodel.ops._conv_checks import packed_sizes
from pybigmodel.ops._conv_geometry import ALGORITHMS, Geometry, exact_algorithm

# What contains linear layers and other blocks, and may be replaced together with them.
BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    nn.MultiheadAttention: MultiheadAttention,
    nn.TransformerEncoderLayer: TransformerEncoderLayer,
    nn.TransformerDecoderLayer: TransformerDecoderLayer,
    nn.TransformerEncoder: TransformerEncoder,
    nn.TransformerDecoder: TransformerDecoder,
}

# Of the attributes that every module has, these hold tensors; the others are hooks and the mode.
_TENSORS = ("_parameters", "_buffers", "_non_persistent_buffers_set")
_KEPT = frozenset(vars(nn.Module())) - set(_TENSORS)
# On a swapped module: its class before, and for int8 the float layer for `restore`, out of reach of
# parameters() and state_dict().
CLASS, ORIGINAL = "_class_of_torch", "_original"
OWN = (
    *("_packed", "_moments", "_precision", "weight_only", "symmetric", CLASS, ORIGINAL),
    *(*STATE, *INT8_STATE, GROUPED),
)
# What a linear layer or a convolution of torch's is, beside its weights.
_SHAPES = (
    *("in_features", "out_features", "in_channels", "out_channels", "kernel_size", "stride"),
    *("padding", "dilation", "groups", "padding_mode", "transposed", "output_padding"),
    "_reversed_padding_repeated_twice",
)
OUR_CONVOLUTIONS = tuple(CONVOLUTIONS.values())
OUR_POOLS: tuple[type[nn.Module], ...] = tuple(POOLS.values())
OUR_INT8: tuple[type[Int8Layer], ...] = (Int8Linear, *INT8_CONVOLUTIONS.values())


def replacement(
    module: nn.Module,
    precision: str,
    inner: Mapping[nn.Module, nn.Module],
    exact: bool = False,
    channels_last: bool = True,
) -> nn.Module:
    """What the layer becomes, on the same Parameters, with `inner` for what it contains.

    exact: convolutions without Winograd; channels_last: they and poolings give images in that
    layout.

    Raises:
        ValueError: NaN or infinity in a weight that is to be quantised.
    """
    new: nn.Module
    if isinstance(module, nn.Linear):
        if precision == "int8":
            new = Int8Linear.from_linear(module)
        else:
            new = Linear.from_linear(module, precision=precision)
        # Its hooks, where it is called as a part of a block.
        vars(new).update({name: vars(module)[name] for name in _KEPT})
        return new
    if type(module) in CONVOLUTIONS:
        if precision == "int8":
            new = INT8_CONVOLUTIONS[type(module)].from_conv(module)
        else:
            new = with_inner(module, {})
            new.__class__ = CONVOLUTIONS[type(module)]
            assert isinstance(new, OUR_CONVOLUTIONS)
            new._set_up(precision, "direct" if exact else "auto")
        # Of one axis torch knows no such layout, and what comes after would convert it.
        if channels_last and len(module.kernel_size) > 1:  # type: ignore[arg-type]
            vars(new)["_channels_last"] = True
        return new
    if type(module) in POOLS:
        new = with_inner(module, {})
        new.__class__ = POOLS[type(module)]
        if channels_last:
            vars(new)["_channels_last"] = True
        return new
    new = with_inner(module, inner)
    new.__class__ = BLOCKS[type(module)]
    if isinstance(new, MultiheadAttention):
        new._set_up(float_precision(precision))
    return new


def float_precision(precision: str) -> str:
    """Of what has no int8: attention, and convolutions that would not gain by it."""
    return "fp32" if precision == "int8" else precision


def with_inner(module: nn.Module, inner: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """A copy on the same Parameters, with `inner` for what it contains."""
    new = module.__new__(type(module))
    vars(new).update(vars(module))
    new._parameters, new._buffers = dict(module._parameters), dict(module._buffers)
    new._modules = {
        name: None if child is None else _exchanged(child, inner)
        for name, child in module._modules.items()
    }
    return new


def _exchanged(module: nn.Module, inner: Mapping[nn.Module, nn.Module]) -> nn.Module:
    if module in inner:
        return inner[module]
    if any(child in inner for child in module.modules()):
        return with_inner(module, inner)
    return module


def become(module: nn.Module, new: nn.Module, keep_original: bool) -> None:
    """Turn `module` into what `new` is, which is its `replacement`; what it contains stays."""
    state: dict[str, Any] = {CLASS: type(module)}
    if isinstance(new, OUR_CONVOLUTIONS):
        new.forget_packed()  # what a trial packed: with a norm folded in it will be another
    if isinstance(new, Int8Layer):
        state[ORIGINAL] = _shell(module)
    kept = _KEPT if isinstance(new, (Linear, Int8Layer)) else vars(module)
    state |= {name: value for name, value in vars(new).items() if name not in kept}
    vars(module).update(state)
    module.__class__ = type(new)
    if isinstance(module, Int8Layer) and not keep_original:
        module._free_original()


def take_in(module: nn.Module) -> None:
    """Have the layers of ours do what follows them in the module's forward."""
    fused = fused_class(module)
    if fused is not None:
        vars(module).setdefault(CLASS, type(module))
        module.__class__ = fused


def is_swapped(module: nn.Module) -> bool:
    return CLASS in vars(module)


def why_not_reverted(module: nn.Module) -> str | None:
    """Why `revert` cannot be: the class was changed since, as parametrizations do."""
    kind = type(module)
    ours = (Linear, *OUR_INT8, *BLOCKS.values(), *OUR_CONVOLUTIONS, *OUR_POOLS)
    if kind in ours or Fused in kind.__bases__:
        return None
    return (
        f"it became a {kind.__module__}.{kind.__qualname__} since; remove its parametrizations "
        "first (torch.nn.utils.parametrize.remove_parametrizations)"
    )


def revert(module: nn.Module) -> None:
    """Turn a swapped module into what it was of torch's again, with the bias it has now.

    Where the float weight was not kept, it is the one that the int8 layer computes with.
    """
    if isinstance(module, Linear | MultiheadAttention):
        module.forget_packed()
    elif isinstance(module, OUR_CONVOLUTIONS):
        module.forget_packed()
    if isinstance(module, Int8Layer):
        original = vars(module)[ORIGINAL]
        if original is None or original.weight.numel() == 0:
            original = _dequantized(module, original)
        _update_bias(original, module.bias)
        for name in _TENSORS:
            vars(module)[name] = vars(original)[name]
    module.__class__ = vars(module)[CLASS]
    for name in OWN:
        vars(module).pop(name, None)


def _update_bias(layer: Any, bias: Tensor | None) -> None:
    """The int8 layer's may have been edited, or loaded."""
    if bias is None or layer.bias is None:
        layer.register_parameter("bias", None if bias is None else nn.Parameter(bias))
    else:
        with torch.inference_mode(layer.bias.is_inference()), torch.no_grad():
            layer.bias.copy_(bias)


def _dequantized(module: Int8Layer, empty: nn.Module | None) -> nn.Module:
    layer = _shell(module, vars(module)[CLASS])
    bias = module.bias
    if empty is not None:
        of_torch: Any = empty
        dtype, trained = of_torch.weight.dtype, of_torch.weight.requires_grad
        layer._parameters.update(empty._parameters)
    else:  # from a pickle
        dtype, trained = torch.float32 if bias is None else bias.dtype, True
        layer.register_parameter("bias", None)
    layer.weight = nn.Parameter(module.dequantized_weight().to(dtype), trained)
    return layer


def _shell(module: nn.Module, kind: type[nn.Module] | None = None) -> nn.Module:
    """A layer of its own on the same Parameter objects, or of torch's `kind` and without any."""
    shell = (kind or type(module)).__new__(kind or type(module))
    nn.Module.__init__(shell)
    own = vars(shell)
    own.update({name: vars(module)[name] for name in _SHAPES if name in vars(module)})
    shell._parameters.update(module._parameters)
    shell.training = module.training
    return shell


def weights_of(module: nn.Module) -> list[Tensor]:
    """The weights that the layer itself multiplies with."""
    one = isinstance(module, (nn.Linear, *CONVOLUTIONS))
    names = ("weight",) if one else WEIGHTS
    weights = (module._parameters.get(name) for name in names)
    return [w for w in weights if w is not None and not isinstance(w, nn.UninitializedParameter)]


def weight_bytes(module: nn.Module) -> int:
    """Bytes of the layer's own weights in every form: as torch stores them, packed, quantised,
    kept."""
    if isinstance(module, Int8Layer):
        kept = vars(module).get(ORIGINAL)
        held = [module.packed_weight, module.weight_scale, *([] if kept is None else [kept.weight])]
        return sum(tensor.nbytes for tensor in held)
    weights = weights_of(module)
    stored = sum(weight.nbytes for weight in weights)
    if isinstance(module, OUR_CONVOLUTIONS):
        return stored + _packed_filter_bytes(module)
    if not isinstance(module, Linear | MultiheadAttention):
        return stored
    return stored + sum(_packed_bytes(weight, module.precision) for weight in weights)


def _packed_bytes(weight: Tensor, precision: str) -> int:
    rows, k = ceil_div(weight.shape[0], PANEL) * PANEL, weight.shape[1]
    if precision == "bf16" or weight.dtype == torch.bfloat16:
        return rows * (k + k % 2) * 2
    return rows * k * 4


def _packed_filter_bytes(module: Any) -> int:
    """Of a convolution's copy, as long as no Winograd runs; transposed ones have none."""
    weight = module.weight
    if module.transposed:
        return 0
    bf16 = module.precision == "bf16" or weight.dtype == torch.bfloat16
    axes = len(module.kernel_size)
    options = ([1] * axes, [0] * (2 * axes), module.dilation, module.groups)  # of no weight
    algorithm = exact_algorithm(Geometry([1] * axes, weight.shape, *options, bf16), True)
    elements = math.prod(packed_sizes(weight.shape, module.groups, bf16, algorithm))
    return elements * (2 if bf16 and algorithm != ALGORITHMS["depthwise"] else 4)
