"""A convolution, its BatchNorm, a residual and an activation, as one op where that is the same.

``y = act(norm(x * W + b) + r)``: the normalisation of inference is a factor and an offset for each
channel, which are folded into copies of weight and bias in float64 and rounded once. The modules
stay as they are and are looked at anew at every call: what is hooked, exchanged, in training or
under autograd is called one by one.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from pybigmodel._torch_private import (
    autocast_enabled,
    dispatch_modes,
    forward_ad,
    hooked_everywhere,
    jit_tracing_state,
    transforms_active,
)
from pybigmodel.nn._activation import activation_of, hooked
from pybigmodel.nn._conv_fold import outliving
from pybigmodel.nn._conv_plan import MOST, Cache, is_norm, pad_in_mode, plan_for
from pybigmodel.nn._int8_chain import int8_in_one
from pybigmodel.nn._packing import Sources, cacheable
from pybigmodel.nn.conv import FORWARD
from pybigmodel.nn.int8_conv import INT8_CONVOLUTIONS
from pybigmodel.ops._common import CONV_ACTIVATIONS

_FUNCTIONS: dict[Any, str] = {
    F.relu6: "relu6",
    F.hardswish: "hardswish",
    F.leaky_relu: "leaky_relu",
}
# What takes in what follows it.
CONVOLVING: tuple[type[nn.Module], ...] = (*FORWARD, *INT8_CONVOLUTIONS.values())
_CONVOLVING = frozenset(CONVOLVING)
_INT8 = frozenset(INT8_CONVOLUTIONS.values())
_NONE = (0, 0.0)
is_grad_enabled = torch.is_grad_enabled
_FIXED = (nn.ReLU, nn.SiLU, nn.Hardswish)
_HELD = (nn.Parameter, Tensor)  # what may be watched: running statistics are buffers


def convolved(
    x: Any,
    layers: tuple[Any, ...],
    residual: Any = None,
    after: Any = None,
    add: Callable[[Any, Any], Any] = operator.add,
    pad: Callable[[Any, Any], Any] | None = None,
) -> Any:
    """``after(add(layers(pad(x)), residual))``, in one op where that is the same.

    Args:
        x: what goes into the first layer.
        layers: a convolution, then what follows it; None stands for nothing.
        residual, after, add: what is added, what is called on the sum, and how it is added.
        pad: a function of x and the convolution, that pads with zeros.
    """
    layer = layers[0]
    if type(layer) in _CONVOLVING and not is_grad_enabled() and not is_dynamo_compiling():
        y = _in_one(layer, x, layers, residual, after, pad)
        if y is not None:
            return y
    y = x if pad is None else pad(x, layer)
    for layer in layers:
        if layer is not None:
            y = layer(y)
    if residual is not None:
        y = add(y, residual)
    return y if after is None else after(y)


class Chain:
    """The parts of a chain that are there."""

    __slots__ = ("_folded", "act", "code", "kinds", "norm")

    def __init__(self, norm: Any, act: Any, kinds: tuple[tuple[nn.Module, type], ...]) -> None:
        self.norm, self.act, self.kinds = norm, act, kinds
        # None where it depends on attributes, which may be assigned.
        fixed = act is None or type(act) in _FIXED or not isinstance(act, nn.Module)
        self.code = (_NONE if act is None else code_of(act)) if fixed else None
        self._folded: Folded | None = None

    def weights(self, layer: Any, weight: Any, key: Any) -> tuple[Any, Tensor | None] | None:
        """The op's weight and bias as they are now; None where changes could not be noticed."""
        if self.norm is None:
            operands: tuple[Any, Tensor | None] | None = layer._operands(weight, key)
            return operands
        norm: Any = self.norm
        parameters, buffers = norm._parameters, norm._buffers
        sources = (
            *(*layer._sources(weight), parameters.get("weight"), parameters.get("bias")),
            *(buffers.get("running_mean"), buffers.get("running_var")),
        )
        folded = self._folded
        if folded is None or norm.eps != folded.eps or not folded.sources.are_current(sources):
            if not all(t is None or cacheable(t, _HELD) for t in sources):
                return None
            # The state first, then the copy: a change in between makes it out of date, not wrong.
            folded = self._folded = Folded(sources, norm.eps)
        found = folded.copies.get(key)
        if found is None:
            with outliving():
                found = folded.copies[key] = layer._folded(sources, folded.eps, key)
        return found


class Folded:
    """Weights and biases with a norm in them, while what they were made from stays."""

    __slots__ = ("copies", "eps", "sources")

    def __init__(self, sources: tuple[Any, ...], eps: float) -> None:
        self.sources, self.eps = Sources(sources), eps
        self.copies: dict[Any, tuple[Any, Tensor]] = {}


def _in_one(
    layer: Any, x: Any, layers: tuple[Any, ...], residual: Any, after: Any, pad: Any
) -> Tensor | None:
    """The result of one op, or None where the parts have to be called one by one."""
    chain = chain_of(layers, residual is not None, after)
    if (
        chain is None
        or hooked_everywhere()
        or autocast_enabled()
        or dispatch_modes()
        or jit_tracing_state() is not None
        or transforms_active()  # batched tensors have no memory to watch, and uint8 would leak
        or forward_ad._current_level >= 0
    ):
        return None
    code = chain.code or code_of(chain.act)
    if code is None:
        return None
    if type(layer) in _INT8:
        return int8_in_one(layer, chain, code, x, residual, pad)
    if not isinstance(x, Tensor) or x.is_nested:  # torch.fx's
        return None
    if layer.padding_mode != "zeros":
        if pad is not None:
            return None
        x = pad_in_mode(layer, x)
    weight = layer._weight_for(x)
    if weight is None:  # the layer says why
        return None
    plan = plan_for(layer, x, weight, pad)
    if plan is None:
        return None
    if residual is not None and not (
        isinstance(residual, Tensor)
        and residual.dtype == x.dtype
        and residual.shape == plan.out_shape
        and residual.device == x.device
    ):
        return None
    found = chain.weights(layer, weight, plan.key)
    if found is None:
        return None
    y: Tensor = plan.run(x, *found, residual, *code)
    return y


def chain_of(layers: tuple[Any, ...], residual: bool, after: Any) -> Chain | None:
    """What is known of these layers, if they are now what can be one op."""
    chains = layers[0]._chains
    key = (layers, residual, after)
    try:
        chain: Chain | None = chains.get(key)
    except TypeError:  # a callable without a hash
        return None
    if chain is None:
        chain = _new_chain(layers, residual, after)
        if chain is None:
            return None
        if len(chains) >= MOST:
            chains.clear()
        _let_go(chains, key)
        chains[key] = chain
    for module, kind in chain.kinds:
        own = module.__dict__  # as `hooked` has it, but for hooks of gradients: none is recorded
        if (
            type(module) is not kind
            or own["_forward_hooks"]
            or own["_forward_pre_hooks"]
            or "forward" in own
        ):
            return None
    norm: Any = chain.norm
    if norm is not None and (norm.training or norm._buffers.get("running_var") is None):
        return None
    return chain


def _let_go(chains: Cache, new: Any) -> None:
    """Forget chains with other modules at the places of the new one's: they are exchanged, and may
    be freed. But not where one comes back: then several take turns."""
    layers, residual, after = new
    chains.take_turns = chains.take_turns or any(m in chains.gone for m in _modules(new))
    if chains.take_turns:
        return
    for old in list(chains):
        others = len(old[0]) == len(layers) and old[1] == residual
        if others and (old[2] is None) == (after is None):
            chains.gone.update(set(_modules(old)) - set(_modules(new)))
            del chains[old]


def _modules(key: Any) -> list[nn.Module]:
    layers, _, after = key
    return [m for m in (*layers[1:], after) if isinstance(m, nn.Module)]


def _new_chain(layers: tuple[Any, ...], residual: bool, after: Any) -> Chain | None:
    rest = [layer for layer in layers[1:] if layer is not None]
    modules = [m for m in (layers[0], *rest, after) if isinstance(m, nn.Module)]
    rest = [layer for layer in rest if type(layer) is not nn.Identity]
    norm = rest.pop(0) if rest and is_norm(rest[0], layers[0]) else None
    if type(after) is nn.Identity:
        after = None
    if not residual and after is not None:
        rest.append(after)
        after = None
    act = after if residual else (rest.pop(0) if rest else None)
    if rest or type(layers[0]) not in CONVOLVING or (act is not None and code_of(act) is None):
        return None
    return Chain(norm, act, tuple((m, type(m)) for m in modules))


def code_of(function: Any) -> tuple[int, float] | None:
    """The op's activation and slope, if calling the function is that and nothing else."""
    if type(function) is nn.ReLU6 and not hooked(function):
        usual = function.min_val == 0.0 and function.max_val == 6.0
        return (CONV_ACTIVATIONS["relu6"], 0.0) if usual else None
    name: str | None = activation_of(function)
    if name is not None:
        return CONV_ACTIVATIONS[name], 0.0
    if not isinstance(function, nn.Module):
        name = next((name for known, name in _FUNCTIONS.items() if known is function), None)
        return None if name is None else (CONV_ACTIVATIONS[name], 0.01)  # torch's default slope
    kind = type(function)
    if hooked(function):
        return None
    if kind is nn.LeakyReLU:
        slope: Any = function.negative_slope
        return CONV_ACTIVATIONS["leaky_relu"], float(slope)
    return (CONV_ACTIVATIONS["hardswish"], 0.0) if kind is nn.Hardswish else None
