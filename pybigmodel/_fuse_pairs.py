"""Finding an activation behind a layer in the source of a forward: ``self.act(self.dense(x))``."""

from __future__ import annotations

import ast
from typing import TypeAlias

from pybigmodel._fuse_source import Path, only_argument, path_of

# Of an activation and the layer before it, as they are written: ("self", "act"), ("self", "dense").
Pair: TypeAlias = tuple[Path, Path]


class Pairs(ast.NodeTransformer):
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
        inner = only_argument(call)
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
                and isinstance(name := only_argument(statement.value), ast.Name)
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
        pair = path_of(outer.func), path_of(inner.func)
        if not pair[0] or pair[1][:1] != ("self",) or only_argument(inner) is None:
            return False
        self.found.append(pair)
        return self._wanted is not None and pair in self._wanted
