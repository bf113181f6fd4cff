"""Activations behind linear layers, done within the product, in modules that are others'.

A module that computes ``self.act(self.dense(x))``, or ``x = self.dense(x); x = self.act(x)``, takes
a class with the same forward, in which each such pair is one call of
:func:`pybigmodel.nn._activation.activated`. That looks at both at every call: layers that are
hooked, exchanged, wrapped or restored later are called one by one, as before.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from types import CodeType, FunctionType
from typing import Any, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

from pybigmodel.nn import Int8Linear, Linear
from pybigmodel.nn._activation import activated, activation_of
from pybigmodel.ops._common import Activation

# Of an activation and the layer before it, as they are written: ("self", "act"), ("self", "dense").
Pair: TypeAlias = tuple[tuple[str, ...], tuple[str, ...]]


class Fused(nn.Module):
    """What marks such a class, which stands before the module's own and has its name."""

    _activated = staticmethod(activated)
    _pairs: frozenset[Pair]

    def __reduce_ex__(self, protocol: Any) -> Any:
        # No import finds the class: its name is the other's.
        reduced: Any = super().__reduce_ex__(protocol)
        _, (kind, *arguments), *state = reduced
        return _new, (kind.__bases__[1], kind._pairs, *arguments), *state


def _new(base: Any, pairs: frozenset[Pair], *arguments: Any) -> nn.Module:
    kind: type[nn.Module] = _fused_class(base, pairs) or base
    return kind.__new__(kind, *arguments)


def fused_class(module: nn.Module) -> type[nn.Module] | None:
    """The class for a module in which an activation follows a layer of this library."""
    base: Any = type(module)
    if issubclass(base, Fused) or is_parametrized(module) or "forward" in vars(module):
        return None
    if base.forward is nn.Sequential.forward:
        return _fused_class(base, frozenset()) if fused_layers(module) else None
    found = frozenset(pair for pair in _pairs_of(base) if _activation(*_called(pair, module)))
    return _fused_class(base, found) if found else None


def fused_layers(module: nn.Module) -> dict[nn.Module, Activation]:
    """The layers of this library in a module whose activation is, or can be, done with them."""
    base = type(module)
    if base.forward in (nn.Sequential.forward, _sequential_forward):
        layers = list(module._modules.values())
        called: list[tuple[Any, Any]] = list(zip(layers[1:], layers, strict=False))
    else:
        called = [_called(pair, module) for pair in getattr(base, "_pairs", ())]
    return {layer: name for act, layer in called if (name := _activation(act, layer)) is not None}


def _activation(function: Any, layer: Any) -> Activation | None:
    return activation_of(function) if isinstance(layer, Linear | Int8Linear) else None


def _called(pair: Pair, module: nn.Module) -> tuple[Any, Any]:
    function, layer = (_found(path, module) for path in pair)
    return function, layer


def _found(path: tuple[str, ...], module: nn.Module) -> Any:
    """What ``self.act`` or ``F.relu`` is in the module's forward; None where it is not there."""
    root, *names = path
    values = {**type(module).forward.__globals__, "self": module}
    found = values.get(root)
    for name in names:
        found = getattr(found, name, None)
    return found


@cache
def _fused_class(base: Any, pairs: frozenset[Pair]) -> type[nn.Module] | None:
    if base.__reduce_ex__ is not object.__reduce_ex__:
        return None
    forward = _sequential_forward if not pairs else _with_pairs(base, pairs)
    names = {name: getattr(base, name) for name in ("__module__", "__qualname__", "__doc__")}
    body = {**names, "forward": forward, "_pairs": pairs}
    kind: type[nn.Module] = type(base)(base.__name__, (Fused, base), body)
    return kind


def _sequential_forward(self: nn.Sequential, input: Any) -> Any:
    layers: list[Any] = list(self._modules.values())
    while layers:
        layer = layers.pop(0)
        if layers and activation_of(layers[0]) is not None:
            input = activated(layers.pop(0), layer, input)
        else:
            input = layer(input)
    return input


# --- the source of a forward ---------------------------------------------------------------------


def _pairs_of(base: type[nn.Module]) -> frozenset[Pair]:
    """All that the forward calls one on the other."""
    pairs = _Pairs(None)
    tree = _source(base)
    if tree is not None:
        pairs.visit(tree)
    return frozenset(pairs.found)


def _with_pairs(base: type[nn.Module], pairs: frozenset[Pair]) -> FunctionType | None:
    """The forward of the class with each of these pairs as one call."""
    tree, old = _source(base), base.forward
    if tree is None:
        return None
    tree = ast.fix_missing_locations(_Pairs(pairs).visit(tree))
    new = FunctionType(_code(tree, old.__code__.co_filename), old.__globals__, old.__name__)
    for name in ("__defaults__", "__kwdefaults__", "__annotations__", "__doc__", "__qualname__"):
        setattr(new, name, getattr(old, name))
    return new


def _source(base: type[nn.Module]) -> ast.Module | None:
    """None where it is not at hand, or is not all that is called (decorators, super())."""
    forward = base.forward
    if not isinstance(forward, FunctionType) or forward.__code__.co_varnames[:1] != ("self",):
        return None
    try:
        lines, number = inspect.getsourcelines(forward)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return None
    ast.increment_lineno(tree, number - 1)
    definition = tree.body[0]
    if not isinstance(definition, ast.FunctionDef) or definition.decorator_list:
        return None
    _strip(definition)
    return tree if _same(_code(tree, ""), forward.__code__) else None  # edited since


def _strip(definition: ast.FunctionDef) -> None:
    """Leave out what is evaluated at the definition."""
    arguments, none = definition.args, ast.Constant(None)
    for argument in ast.walk(arguments):
        if isinstance(argument, ast.arg):
            argument.annotation = None
    arguments.defaults = [none for _ in arguments.defaults]
    arguments.kw_defaults = [default and none for default in arguments.kw_defaults]
    definition.returns = None
    ast.fix_missing_locations(definition)


def _code(tree: ast.Module, file: str) -> CodeType:
    constants = compile(tree, file, "exec", dont_inherit=True).co_consts
    return next(constant for constant in constants if isinstance(constant, CodeType))


def _same(one: CodeType, other: CodeType) -> bool:
    """Whether both come of one source: the bytecode also depends on what the file imports."""
    names = ("co_names", "co_varnames", "co_cellvars", "co_freevars")
    constants, others = (
        [constant for constant in code.co_consts if not isinstance(constant, CodeType)]
        for code in (one, other)
    )
    return constants == others and all(getattr(one, n) == getattr(other, n) for n in names)


class _Pairs(ast.NodeTransformer):
    """Finds the pairs, and makes those that are wanted single calls of ``self._activated``."""

    def __init__(self, wanted: frozenset[Pair] | None) -> None:
        self._wanted = wanted
        self.found: list[Pair] = []

    def generic_visit(self, node: ast.AST) -> ast.AST:
        for name in ("body", "orelse", "finalbody"):
            statements = getattr(node, name, None)
            if isinstance(statements, list):
                setattr(node, name, self._merged(statements))
        return super().generic_visit(node)

    def visit_Call(self, call: ast.Call) -> ast.AST:
        inner = _only_argument(call)
        if isinstance(inner, ast.Call) and self._is_wanted(call, inner):
            target = ast.Attribute(ast.Name("self", ast.Load()), "_activated", ast.Load())
            new = ast.Call(target, [call.func, inner.func, *inner.args], [])
            return self.generic_visit(ast.copy_location(new, call))
        return self.generic_visit(call)

    def _merged(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        """With ``x = f(y); x = g(x)`` as ``x = g(f(y))`` where the two are wanted."""
        merged: list[ast.stmt] = []
        for statement in statements:
            last = merged[-1] if merged else None
            if (
                isinstance(last, ast.Assign)
                and isinstance(statement, ast.Assign)
                and isinstance(last.value, ast.Call)
                and isinstance(statement.value, ast.Call)
                and isinstance(name := _only_argument(statement.value), ast.Name)
                and [ast.dump(target) for target in last.targets + statement.targets]
                == [ast.dump(ast.Name(name.id, ast.Store()))] * 2
                and self._is_wanted(statement.value, last.value)
            ):
                last.value = ast.copy_location(
                    ast.Call(statement.value.func, [last.value], []), last.value
                )
            else:
                merged.append(statement)
        return merged

    def _is_wanted(self, outer: ast.Call, inner: ast.Call) -> bool:
        pair = _path(outer.func), _path(inner.func)
        if not pair[0] or pair[1][:1] != ("self",) or _only_argument(inner) is None:
            return False
        self.found.append(pair)
        return self._wanted is not None and pair in self._wanted


def _only_argument(call: ast.Call) -> ast.expr | None:
    alone = len(call.args) == 1 and not call.keywords
    return call.args[0] if alone and not isinstance(call.args[0], ast.Starred) else None


def _path(function: ast.expr) -> tuple[str, ...]:
    """("self", "a", "b") of ``self.a.b``; () of anything else."""
    if isinstance(function, ast.Name):
        return (function.id,)
    if isinstance(function, ast.Attribute):
        before = _path(function.value)
        return (*before, function.attr) if before else ()
    return ()
