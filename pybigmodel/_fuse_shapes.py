"""What statements and expressions of a forward are, for finding chains in it: their shapes."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from typing import TypeAlias

from pybigmodel._fuse_source import Path, only_argument, path_of


@dataclass
class Sum:
    """A statement that adds `residual` to a name: ``name += r`` and its like."""

    residual: ast.expr
    add: str  # "_iadd", "_add"
    after: ast.expr | None  # what is called on the sum
    target: str | None  # None: returned
    where: ast.expr | None = None  # the condition under which it is added
    used: int = 1  # statements


def own_name(name: str) -> ast.expr:
    return ast.Attribute(ast.Name("self", ast.Load()), name, ast.Load())


def none() -> ast.expr:
    return ast.Constant(None)


def chain_call(argument: ast.expr, layers: list[ast.expr]) -> ast.Call:
    return ast.Call(own_name("_convolved"), [argument, ast.Tuple(list(layers), ast.Load())], [])


def _is_convolved(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Call) and path_of(node.func) == ("self", "_convolved")


def unnested(call: ast.Call) -> tuple[list[ast.expr], ast.expr]:
    """Of ``f(g(x))`` [g, f] and x; [] of a call of another form."""
    functions: list[ast.expr] = []
    node: ast.expr = call
    while isinstance(node, ast.Call):
        argument = only_argument(node)
        if argument is None or not path_of(node.func):
            break
        functions.insert(0, node.func)
        node = argument
    return functions, node


def nested(functions: list[ast.expr], argument: ast.expr) -> ast.expr:
    for function in functions:
        argument = ast.Call(function, [argument], [])
    return argument


def target_of(statement: ast.stmt) -> str | None:
    if isinstance(statement, ast.Assign) and len(statement.targets) == 1:
        target = statement.targets[0]
        return target.id if isinstance(target, ast.Name) else None
    return None


def chain_of(statement: ast.stmt) -> ast.Call | None:
    """The chain that the statement assigns, or returns."""
    value = getattr(statement, "value", None)
    if isinstance(statement, ast.Assign | ast.Return) and _is_convolved(value):
        return value if isinstance(value, ast.Call) else None
    return None


def link_of(statement: ast.stmt) -> tuple[str, list[ast.expr]] | None:
    """h and [g] of ``h = g(h)``, of ``return g(h)`` and, as an optional one, of ``if g is not None:
    h = g(h)``."""
    if isinstance(statement, ast.If):
        tested = _tested(statement.test)
        if tested is None or len(statement.body) != 1 or statement.orelse:
            return None
        link = link_of(statement.body[0])
        if link is None or not isinstance(statement.body[0], ast.Assign) or len(link[1]) != 1:
            return None
        if ast.dump(link[1][0]) != ast.dump(tested):
            return None
        return link[0], [tested]  # which is None where it is not called
    value = getattr(statement, "value", None)
    if not isinstance(value, ast.Call) or not isinstance(statement, ast.Assign | ast.Return):
        return None
    functions, argument = unnested(value)
    if not functions or not isinstance(argument, ast.Name):
        return None
    if isinstance(statement, ast.Assign) and target_of(statement) != argument.id:
        return None
    return argument.id, functions


def _tested(test: ast.expr) -> ast.expr | None:
    """g of ``g is not None``, and of ``g``, where g is a path."""
    if isinstance(test, ast.Compare) and len(test.ops) == 1 and isinstance(test.ops[0], ast.IsNot):
        right = test.comparators[0]
        is_none = isinstance(right, ast.Constant) and right.value is None
        return test.left if is_none and path_of(test.left) else None
    return None


Called: TypeAlias = tuple[list[ast.expr], ast.expr, list[ast.keyword]]


def called_in(statement: ast.stmt) -> Called | None:
    """Layers, argument and padding of ``h = self._convolved(x, layers)``, ``h = self.block(x)``."""
    return _of_call(statement.value) if isinstance(statement, ast.Assign) else None


def _of_call(value: ast.expr) -> Called | None:
    if not isinstance(value, ast.Call):
        return None
    if _is_convolved(value):
        layers: ast.Tuple = value.args[1]  # type: ignore[assignment]
        plain = len(value.args) == 2 and isinstance(value.args[0], ast.Name)
        return (layers.elts, value.args[0], value.keywords) if plain else None
    argument = only_argument(value)
    if not isinstance(argument, ast.Name) or path_of(value.func)[:1] != ("self",):
        return None
    return [value.func], argument, []


def own_sum(
    statement: ast.stmt,
) -> tuple[Sum, list[ast.expr], ast.expr, list[ast.keyword]] | None:
    """``return x + self.layers(x)``, or assigned."""
    if not isinstance(statement, ast.Return | ast.Assign) or statement.value is None:
        return None
    target = target_of(statement)
    if isinstance(statement, ast.Assign) and target is None:
        return None
    added, after = _addition(statement.value)
    if added is None:
        return None
    for one, other in ((added.left, added.right), (added.right, added.left)):
        called = _of_call(one)
        if called is not None and isinstance(other, ast.Name):
            return Sum(other, "_add", after, target), *called
    return None


def _addition(value: ast.expr) -> tuple[ast.BinOp | None, ast.expr | None]:
    """The sum, and what is called on it."""
    after, added = None, value
    if isinstance(value, ast.Call):
        inner = only_argument(value)
        if inner is None or not path_of(value.func):
            return None, None
        added, after = inner, value.func
    if isinstance(added, ast.BinOp) and isinstance(added.op, ast.Add):
        return added, after
    return None, None


def is_apart(statement: ast.stmt, name: str, argument: ast.expr) -> bool:
    """Whether the statement leaves the name and the argument alone and goes on to the next, if the
    layers that it calls (`groups_in`) write to nothing that they are given."""
    if not isinstance(statement, ast.Assign | ast.If):
        return False
    for node in ast.walk(statement):
        if isinstance(node, ast.Name):
            if node.id == name or (
                isinstance(argument, ast.Name)
                and node.id == argument.id
                and not isinstance(node.ctx, ast.Load)
            ):
                return False
        elif not isinstance(node, _PLAIN):
            return False
        elif isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load):
            return False  # which may be one of the layers
        elif isinstance(node, ast.Call) and not _group_of(node):
            return False
    return True


def groups_in(statements: list[ast.stmt]) -> list[tuple[Path, ...]]:
    """The layers that are called in them, together those that are called one on the other."""
    nodes = [node for statement in statements for node in ast.walk(statement)]
    groups = [_group_of(node) for node in nodes if isinstance(node, ast.Call)]
    return list(dict.fromkeys(groups))


def _group_of(call: ast.Call) -> tuple[Path, ...]:
    """() of what does not call the module's layers alone, on one argument."""
    called: list[ast.expr] = [call.func]
    if _is_convolved(call):
        layers: ast.Tuple = call.args[1]  # type: ignore[assignment]
        called = layers.elts
    elif only_argument(call) is None:
        return ()
    paths = tuple(path_of(function) for function in called)
    return paths if all(path[:1] == ("self",) and len(path) > 1 for path in paths) else ()


_PLAIN = (
    *(ast.Assign, ast.If, ast.Call, ast.Attribute, ast.Compare, ast.IsNot, ast.Is, ast.Constant),
    *(ast.Tuple, ast.expr_context, ast.IfExp, ast.keyword),
)


def sum_of(statements: list[ast.stmt], name: str) -> Sum | None:
    """How the first statements add to the name."""
    if not statements:
        return None
    first = statements[0]
    if isinstance(first, ast.AugAssign):
        plain = isinstance(first.target, ast.Name) and first.target.id == name
        if not plain or not isinstance(first.op, ast.Add) or not _is_simple(first.value, name):
            return None
        return _with_next(Sum(first.value, "_iadd", None, name), statements[1:])
    value = getattr(first, "value", None)
    if not isinstance(first, ast.Assign | ast.Return) or value is None:
        return None
    target = target_of(first)
    where: ast.expr | None = None
    if isinstance(first, ast.Assign) and target != name:
        return None
    choice = value if isinstance(first, ast.Return) and isinstance(value, ast.IfExp) else None
    if choice is not None:
        other = choice.orelse
        plain = isinstance(other, ast.Name) and other.id == name
        if not plain or path_of(choice.test)[:1] != ("self",):
            return None
        value, where = choice.body, choice.test
    added, after = _addition(value)
    if added is None:
        return None
    for one, other in ((added.left, added.right), (added.right, added.left)):
        if isinstance(one, ast.Name) and one.id == name and _is_simple(other, name):
            result = Sum(other, "_add", after, target, where)
            return result if after or target is None else _with_next(result, statements[1:])
    return None


def _is_simple(residual: ast.expr, name: str) -> bool:
    return isinstance(residual, ast.Name) and residual.id != name


def _with_next(added: Sum, statements: list[ast.stmt]) -> Sum:
    """With the activation of the next statement, if it is one."""
    link = link_of(statements[0]) if statements else None
    if link is not None and link[0] == added.target and len(link[1]) == 1:
        if not isinstance(link[1][0], ast.IfExp):
            added.after, added.used = link[1][0], 2
            if isinstance(statements[0], ast.Return):
                added.target = None
    return added


def only_chain(definition: ast.FunctionDef) -> ast.Call | None:
    """The chain on the forward's one argument, if it is all that the forward does."""
    arguments = definition.args
    body = [s for s in definition.body if not _is_docstring(s)]
    if not body or len(arguments.args) != 2 or arguments.kwonlyargs or arguments.kwarg:
        return None
    chain = chain_of(body[0])
    if chain is None or len(chain.args) != 2:
        return None
    ends = isinstance(body[0], ast.Return)
    if not ends and len(body) == 2 and isinstance(body[1], ast.Return):
        value = body[1].value
        ends = isinstance(value, ast.Name) and value.id == target_of(body[0])
    name = chain.args[0]
    its_own = isinstance(name, ast.Name) and name.id == arguments.args[1].arg
    return chain if ends and its_own and not arguments.vararg else None


def _is_docstring(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Constant)
