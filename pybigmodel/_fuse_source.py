"""The source of a module's forward, as a tree, and the forward that a changed tree makes."""

from __future__ import annotations

import ast
import inspect
import textwrap
from types import CodeType, FunctionType
from typing import Any, TypeAlias

from torch import nn

Path: TypeAlias = tuple[str, ...]  # ("self", "a", "b") of `self.a.b`


def function_of(tree: ast.Module, old: FunctionType) -> FunctionType:
    """The forward `old` with another body."""
    ast.fix_missing_locations(tree)
    new = FunctionType(_code(tree, old.__code__.co_filename), old.__globals__, old.__name__)
    for name in ("__defaults__", "__kwdefaults__", "__annotations__", "__doc__", "__qualname__"):
        setattr(new, name, getattr(old, name))
    return new


def source_of(base: type[nn.Module], method: str = "forward") -> ast.Module | None:
    """None where it is not at hand, or is not all that is called (decorators, super())."""
    forward = getattr(base, method, None)
    if not isinstance(forward, FunctionType) or forward.__code__.co_varnames[:1] != ("self",):
        return None
    if forward.__globals__ is not getattr(base.forward, "__globals__", None):  # which `found` reads
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


def only_argument(call: ast.Call) -> ast.expr | None:
    alone = len(call.args) == 1 and not call.keywords
    return call.args[0] if alone and not isinstance(call.args[0], ast.Starred) else None


def path_of(function: ast.expr) -> Path:
    """() of what is no path."""
    if isinstance(function, ast.Name):
        return (function.id,)
    if isinstance(function, ast.Attribute):
        before = path_of(function.value)
        return (*before, function.attr) if before else ()
    return ()


def found(path: Path, module: nn.Module) -> Any:
    """What ``self.act`` or ``F.relu`` is in the module's forward; None where it is not there."""
    if not path:
        return None
    root, *names = path
    values = {**type(module).forward.__globals__, "self": module}
    value = values.get(root)
    for name in names:
        value = getattr(value, name, None)
    return value
