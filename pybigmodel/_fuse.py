"""What follows a layer, done within its product, in modules that are others'.

A module that computes ``self.act(self.dense(x))``, or ``x = self.dense(x); x = self.act(x)``, takes
a class with the same forward, in which each such pair is one call of
:func:`pybigmodel.nn._activation.activated`, and what follows a convolution (BatchNorm, a residual,
an activation) one call of :func:`pybigmodel.nn._conv_chain.convolved`. These look at the layers at
every call: what is hooked, exchanged, wrapped or restored later is called one by one, as before.
"""

from __future__ import annotations

import ast
import copy
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from types import FunctionType
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling
from torch.nn.utils.parametrize import is_parametrized

from pybigmodel._fuse_apart import leave_alone
from pybigmodel._fuse_chains import APART, CHAIN, PAD, TAIL, Chains, Direct, Site
from pybigmodel._fuse_pairs import Pair, Pairs
from pybigmodel._fuse_source import Path, found, function_of, source_of
from pybigmodel._torch_private import hooked_everywhere
from pybigmodel.nn import Int8Linear, Linear
from pybigmodel.nn._activation import activated, activation_of, hooked
from pybigmodel.nn._conv_chain import CONVOLVING, chain_of, code_of, convolved
from pybigmodel.nn._conv_plan import is_norm
from pybigmodel.ops._common import CONV_ACTIVATIONS, Activation

_NAMES = {code: name for name, code in CONV_ACTIVATIONS.items()}
_METHODS = ("forward", "_forward_impl")  # the latter is what torchvision's forward calls
GROUPED = "_grouped_layers"  # an attribute of a Sequential
# Functions of an image and a convolution that pad with zeros: transformers', after TensorFlow.
_PADDING = ("transformers.", "apply_tf_padding")


@dataclass
class Taken:
    """What a layer does beside itself."""

    activation: str | None = None
    norm: nn.Module | None = None
    residual: bool = False
    where: str = ""  # how it was found


class Fused(nn.Module):
    """What marks such a class, which stands before the module's own and has its name."""

    _activated = staticmethod(activated)
    _convolved = staticmethod(convolved)
    _iadd = staticmethod(operator.iadd)
    _add = staticmethod(operator.add)
    _pairs: frozenset[Pair]
    _sites: frozenset[Site]

    @staticmethod
    def _with_residual(
        x: Any,
        layers: tuple[Any, ...],
        residual: Any,
        after: Any,
        add: Callable[[Any, Any], Any],
        pad: Any = None,
    ) -> Any:
        if isinstance(layers[0], Fused):
            return layers[0]._forward_and(x, residual, after, add)
        return convolved(x, layers, residual, after, add, pad)

    @staticmethod
    def _takes(layers: Sequence[Any], after: Any) -> bool:
        """Whether a residual, and `after` on the sum, can be done with these layers now."""
        if torch.is_grad_enabled() or is_dynamo_compiling() or hooked_everywhere():
            return False
        layer = layers[0]
        if isinstance(layer, CONVOLVING):
            return chain_of(tuple(layers), True, after) is not None
        return isinstance(layer, Fused) and not hooked(layer) and layer._ends_in_chain(after)

    def _leave_alone(self, groups: Iterable[tuple[Path, ...]]) -> bool:
        """Whether what these layers are given stays as it was."""
        return all(leave_alone(reduce(_get, path[1:], self) for path in group) for group in groups)

    def _ends_in_chain(self, after: Any) -> bool:
        layers = self._last_layers()
        return bool(layers) and self._takes(layers, after)

    def _last_layers(self) -> tuple[Any, ...]:
        """What the forward calls last, if a residual can be added there."""
        return ()

    def _forward_and(
        self, x: Any, residual: Any, after: Any, add: Callable[[Any, Any], Any]
    ) -> Any:
        """The forward, with the residual added to what it gives."""
        raise NotImplementedError  # where _last_layers gives any, so is this

    def __reduce_ex__(self, protocol: Any) -> Any:
        # No import finds the class: its name is the other's.
        reduced: Any = super().__reduce_ex__(protocol)
        _, (kind, *arguments), *state = reduced
        return _new, (kind.__bases__[1], kind._pairs, kind._sites, *arguments), *state


def _get(value: Any, name: str) -> Any:
    return getattr(value, name, None)


def _new(base: Any, pairs: frozenset[Pair], sites: frozenset[Site], *arguments: Any) -> nn.Module:
    kind: type[nn.Module] = _fused_class(base, pairs, sites) or base
    return kind.__new__(kind, *arguments)


def fused_class(module: nn.Module) -> type[nn.Module] | None:
    """The class for a module in which something follows a layer of this library.

    What the module contains has its class already.
    """
    base: Any = type(module)
    if issubclass(base, Fused) or is_parametrized(module) or "forward" in vars(module):
        return None
    if base.forward is nn.Sequential.forward:
        layers = list(module._modules.values())
        ends = bool(layers) and _ends_in_chain(layers[-1:], None) and _starts_in_chain(layers[0])
        return _fused_class(base, frozenset(), frozenset()) if taken_in(module) or ends else None
    pairs = frozenset(pair for pair in _pairs_of(base) if _activation(*_called(pair, module)))
    sites = _sites_of(base, module)
    return _fused_class(base, pairs, sites) if pairs or sites else None


def taken_in(module: nn.Module) -> dict[nn.Module, Taken]:
    """The layers of this library in a module, with what is, or can be, done with them there."""
    base: Any = type(module)
    taken: dict[nn.Module, Taken] = {}
    if base.forward in (nn.Sequential.forward, _sequential_forward):
        for group in _groups(list(module._modules.values())):
            if isinstance(group[0], CONVOLVING):
                _note(taken, group, f"{_torchs(base).__name__}")
            elif len(group) == 2 and (name := _activation(group[1], group[0])) is not None:
                taken[group[0]] = Taken(name, where=_torchs(base).__name__)
        return taken
    where = f"forward of {base.__name__}"
    for pair in getattr(base, "_pairs", ()):
        function, layer = _called(pair, module)
        if (name := _activation(function, layer)) is not None:
            taken[layer] = Taken(name, where=where)
    # What is a part of another before that.
    sites = sorted(getattr(base, "_sites", ()), key=lambda site: (site[0] == TAIL, len(site)))
    for kind, *paths in sites:
        values = [found(path, module) for path in paths]
        if kind == CHAIN and _joins(values):
            _note(taken, values, where)
        elif kind == TAIL and _is_wanted((kind, *paths), module):
            *layers, after, _ = values
            _note(taken, _last_of(layers), where, residual=True, after=after)
    return taken


def _note(
    taken: dict[nn.Module, Taken],
    layers: Sequence[Any],
    where: str,
    residual: bool = False,
    after: Any = None,
) -> None:
    norm = next((layer for layer in layers[1:] if is_norm(layer, layers[0])), None)
    act = after if residual else next((a for a in layers[1:] if _code(a) is not None), None)
    if norm is not None or act is not None or residual:
        code = _code(act)
        name = None if code is None else _NAMES[code[0]]
        taken[layers[0]] = Taken(name, norm, residual, where)


def _code(function: Any) -> tuple[int, float] | None:
    return None if function is None else code_of(function)


def _activation(function: Any, layer: Any) -> Activation | None:
    return activation_of(function) if isinstance(layer, Linear | Int8Linear) else None


def _called(pair: Pair, module: nn.Module) -> tuple[Any, Any]:
    function, layer = (found(path, module) for path in pair)
    return function, layer


# --- what can be one op --------------------------------------------------------------------------


def _joins(layers: Sequence[Any]) -> bool:
    """Whether they are a convolution, then at most a BatchNorm, then at most an activation."""
    first, *rest = layers
    if not isinstance(first, CONVOLVING):
        return False
    rest = [layer for layer in rest if layer is not None and type(layer) is not nn.Identity]
    if rest and is_norm(rest[0], first):
        rest.pop(0)
    return not rest or (len(rest) == 1 and code_of(rest[0]) is not None)


def _ends_in_chain(layers: Sequence[Any], after: Any) -> bool:
    """Whether what the layers end in can take a residual, and `after` on the sum."""
    if after is not None and type(after) is not nn.Identity and code_of(after) is None:
        return False
    last = _last_of(layers)
    return bool(last) and _joins(last) and not any(_code(act) for act in last[1:])


def _last_of(layers: Sequence[Any]) -> tuple[Any, ...]:
    """The convolution at the end, and what follows it."""
    first = layers[0]
    if isinstance(first, CONVOLVING):
        return tuple(layers)
    if len(layers) != 1 or not isinstance(first, Fused):
        return ()
    inner = first._last_layers()
    return _last_of(inner) if inner else ()


def _starts_in_chain(layer: Any) -> bool:
    """Whether the first thing that is done to an image is a convolution, which leaves it as is."""
    return isinstance(layer, CONVOLVING) or (
        isinstance(layer, Fused) and bool(layer._last_layers())
    )


def _groups(layers: list[Any]) -> Iterable[tuple[Any, ...]]:
    """The layers, those together that are called as one."""
    at = 0
    while at < len(layers):
        start = at
        at += 1
        layer = layers[start]
        if isinstance(layer, CONVOLVING):
            while at < len(layers) and _joins(layers[start : at + 1]):
                at += 1
        elif at < len(layers) and isinstance(layer, Linear | Int8Linear):
            at += activation_of(layers[at]) is not None
        yield tuple(layers[start:at])


# --- the classes ---------------------------------------------------------------------------------


@cache
def _fused_class(
    base: Any, pairs: frozenset[Pair], sites: frozenset[Site]
) -> type[nn.Module] | None:
    if base.__reduce_ex__ is not object.__reduce_ex__:
        return None
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    body: dict[str, Any] = {**names, "_pairs": pairs, "_sites": sites}
    if not pairs and not sites:
        body["forward"] = _sequential_forward
        body["_forward_and"] = _sequential_forward_and
        body["_last_layers"] = _last_layers_of_sequential
    else:
        body |= _rewritten(base, pairs, sites)
    kind: type[nn.Module] = type(base)(base.__name__, (Fused, base), body)
    return kind


def _sequential_forward(self: Any, input: Any) -> Any:
    if is_dynamo_compiling():
        for layer in self._modules.values():
            input = layer(input)
        return input
    for group in _grouped(self):
        input = _of_group(self, group, input)
    return input


def _grouped(self: Any) -> tuple[tuple[Any, ...], ...]:
    """The groups as they were when the layers were last others: they say what to call with what,
    and what is called looks at each."""
    layers = tuple(self._modules.values())
    known = self.__dict__.get(GROUPED)
    if known is None or known[0] != layers:
        known = self.__dict__[GROUPED] = (layers, tuple(_groups(list(layers))))
    groups: tuple[tuple[Any, ...], ...] = known[1]
    return groups


def _of_group(self: Any, group: tuple[Any, ...], input: Any) -> Any:
    if isinstance(group[0], CONVOLVING):
        return self._convolved(input, group)
    return group[0](input) if len(group) == 1 else activated(group[1], group[0], input)


def _sequential_forward_and(self: Any, x: Any, residual: Any, after: Any, add: Any) -> Any:
    *groups, last = _grouped(self)
    for group in groups:
        x = _of_group(self, group, x)
    return self._with_residual(x, last, residual, after, add)


def _last_layers_of_sequential(self: Any) -> tuple[Any, ...]:
    groups = _grouped(self)
    if not groups or not _starts_in_chain(groups[0][0]):
        return ()
    last = groups[-1]
    return last if isinstance(last[0], (*CONVOLVING, Fused)) else ()


def _torchs(base: type[nn.Module]) -> type[nn.Module]:
    return base.__bases__[1] if issubclass(base, Fused) else base


def _pairs_of(base: type[nn.Module]) -> frozenset[Pair]:
    """All that the forward calls one on the other."""
    pairs = Pairs(None)
    tree = source_of(base)
    if tree is not None:
        pairs.visit(tree)
    return frozenset(pairs.found)


def _sites_of(base: type[nn.Module], module: nn.Module) -> frozenset[Site]:
    """The sites of the forward at which this module has what can be one op."""
    if not any(isinstance(part, CONVOLVING) for part in module.modules()):
        return frozenset()
    sites: set[Site] = set()

    def wanted(site: Site) -> bool:
        if _is_wanted(site, module):
            sites.add(site)
            return True
        return False

    last = None
    for method in _METHODS:
        tree = source_of(base, method)
        if tree is not None:
            chains = Chains(wanted)
            chains.visit(tree)
            last = last or chains.last
    several = any(site[0] in (TAIL, PAD) or len(site) > 2 for site in sites if site[0] != APART)
    return frozenset(sites) if several or last is not None else frozenset()


def _is_wanted(site: Site, module: nn.Module) -> bool:
    kind, *paths = site
    values = [found(path, module) for path in paths]  # type: ignore[arg-type]
    if kind == CHAIN:
        return _joins(values)
    if kind == APART:
        return leave_alone(values)
    if kind == PAD:
        place, name = _PADDING
        function, layer = values
        is_known = getattr(function, "__name__", "") == name
        return is_known and function.__module__.startswith(place) and isinstance(layer, CONVOLVING)
    *layers, after, where = values
    return (not paths[-1] or bool(where)) and _ends_in_chain(layers, after)


def _rewritten(base: Any, pairs: frozenset[Pair], sites: frozenset[Site]) -> dict[str, Any]:
    """The methods of the class, with each of these as one call."""
    methods: dict[str, Any] = {}
    for method in _METHODS:
        tree = source_of(base, method)
        if tree is None:
            continue
        if sites:
            chains = Chains(sites.__contains__)
            tree = Direct(base).visit(chains.visit(tree))
            if chains.last is not None and method == "forward":
                methods |= _with_residual(base.forward, chains.last)
        if pairs and method == "forward":
            tree = Pairs(pairs).visit(tree)
        methods[method] = function_of(tree, getattr(base, method))
    return methods


def _with_residual(old: FunctionType, chain: ast.Call) -> dict[str, FunctionType]:
    """`_forward_and` and `_last_layers` of a forward that is one chain."""
    arguments = "self, x, residual, after, add"
    forward = _method(f"def _forward_and({arguments}): return 0")
    call = copy.deepcopy(chain)
    call.args = [_name("x"), call.args[1], *map(_name, ("residual", "after", "add"))]
    call.func.attr = "_with_residual"  # type: ignore[attr-defined]
    last = _method("def _last_layers(self): return 0")
    for method, value in ((forward, call), (last, chain.args[1])):
        method.body[0].body[0].value = copy.deepcopy(value)  # type: ignore[attr-defined]
        ast.increment_lineno(ast.fix_missing_locations(method), old.__code__.co_firstlineno - 1)
    return {
        "_forward_and": _compiled(forward, old, "_forward_and"),
        "_last_layers": _compiled(last, old, "_last_layers"),
    }


def _method(source: str) -> ast.Module:
    return ast.parse(source)


def _name(name: str) -> ast.expr:
    return ast.Name(name, ast.Load())


def _compiled(tree: ast.Module, old: FunctionType, name: str) -> FunctionType:
    space: dict[str, Any] = {}
    exec(compile(tree, old.__code__.co_filename, "exec", dont_inherit=True), old.__globals__, space)
    method: FunctionType = space[name]
    return method
