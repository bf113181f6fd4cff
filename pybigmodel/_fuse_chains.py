"""Finding what follows a convolution in the source of a forward, and making it one call.

Of ``h = self.conv(h); h = self.bn(h); h = self.act(h)``, nested or in steps, some behind
``if self.bn is not None:``, becomes ``h = self._convolved(h, (self.conv, self.bn, self.act))``. Of
a residual that is added to such a chain, or to what a module ends in, becomes ::

    if self._leave_alone(((self.downsample,),)) and self._takes((self.conv, self.bn), self.act):
        ...  # what stood between and has nothing to do with h: identity = self.downsample(x)
        h = self._convolved(h, (self.conv, self.bn), residual, self.act, self._iadd)
    else:
        ...  # as it was written

Which of what is found here is wanted is another's to say: a site is asked about by its name.
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable
from typing import TypeAlias

from pybigmodel._fuse_shapes import (
    Sum,
    called_in,
    chain_call,
    chain_of,
    groups_in,
    is_apart,
    link_of,
    nested,
    none,
    only_chain,
    own_name,
    own_sum,
    sum_of,
    target_of,
    unnested,
)
from pybigmodel._fuse_source import Path, path_of

# ("chain", conv, bn, act): these after one another. ("tail", layer, …, after, where): a residual
# added to what the layers give where `where` is true, and `after` called on the sum; () for none of
# these. ("pad", function, conv). ("apart", layer, …): these called one on the other, beside a tail.
Site: TypeAlias = tuple[str | Path, ...]
CHAIN, TAIL, PAD, APART = "chain", "tail", "pad", "apart"
Wanted: TypeAlias = Callable[[Site], bool]


class Chains(ast.NodeTransformer):
    """Asks `wanted` about every site, and rewrites those that are."""

    def __init__(self, wanted: Wanted) -> None:
        self._wanted = wanted
        self._under: Path = ()  # the condition of the innermost `if self.a:` around
        # The layers of the chain that is all that the forward does: what it can add a residual to.
        self.last: ast.Call | None = None

    def visit_FunctionDef(self, definition: ast.FunctionDef) -> ast.AST:
        definition.body = self._rewritten(definition.body)
        self.last = only_chain(definition)
        return definition

    def generic_visit(self, node: ast.AST) -> ast.AST:
        # Not ast's own, which would visit again what a list of statements became.
        for name, value in ast.iter_fields(node):
            if isinstance(value, list) and value and isinstance(value[0], ast.stmt):
                setattr(node, name, self._rewritten(value))
            elif isinstance(value, list):
                value[:] = [self.visit(v) if isinstance(v, ast.AST) else v for v in value]
            elif isinstance(value, ast.AST):
                setattr(node, name, self.visit(value))
        return node

    def visit_If(self, statement: ast.If) -> ast.AST:
        before, path = self._under, path_of(statement.test)
        self._under = path if path[:1] == ("self",) else before
        statement.body = self._rewritten(statement.body)
        self._under = before
        statement.orelse = self._rewritten(statement.orelse)
        return statement

    def visit_Call(self, call: ast.Call) -> ast.AST:
        """``f(g(h(x)))``: the chain that starts at the first convolution."""
        functions, argument = unnested(call)
        for start, function in enumerate(functions):
            if self._is_chain([function]):
                end = start + 1
                while end < len(functions) and self._is_chain(functions[start : end + 1]):
                    end += 1
                if start:
                    argument = nested(functions[:start], argument)
                chain = chain_call(self.visit(argument), functions[start:end])
                return ast.copy_location(nested(functions[end:], chain), call)
        return self.generic_visit(call)

    def _is_chain(self, functions: list[ast.expr]) -> bool:
        paths = [path_of(function) for function in functions]
        return all(paths) and self._wanted((CHAIN, *paths))

    def _rewritten(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        visited = [self.visit(copy.deepcopy(statement)) for statement in statements]
        return self._with_residuals(self._merged(visited))

    # --- one after the other ---------------------------------------------------------------------

    def _merged(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        merged: list[ast.stmt] = []
        for statement in statements:
            last = merged[-1] if merged else None
            if last is None or not (self._joined(last, statement) or self._padded(last, statement)):
                merged.append(statement)
            elif chain_of(last) is None:
                merged[-1] = statement  # which the padding went into
        return merged

    def _joined(self, last: ast.stmt, statement: ast.stmt) -> bool:
        """Whether `statement` calls a layer on the chain of `last`, and is now a part of it."""
        chain, link = chain_of(last), link_of(statement)
        if chain is None or link is None or target_of(last) != link[0]:
            return False
        layers: ast.Tuple = chain.args[1]  # type: ignore[assignment]
        if len(chain.args) > 2 or not self._is_chain([*layers.elts, *link[1]]):
            return False
        layers.elts += link[1]
        if isinstance(statement, ast.Return):
            # The value is what the name would have been.
            last.__class__ = ast.Return
            last.__dict__.pop("targets", None)
        return True

    def _padded(self, last: ast.stmt, statement: ast.stmt) -> bool:
        """Whether `last` pads what goes into the chain of `statement`, which now does."""
        chain, condition, padding = chain_of(statement), None, last
        if chain is None:
            return False
        if isinstance(last, ast.If) and len(last.body) == 1 and not last.orelse:
            condition, padding = last.test, last.body[0]
        call = padding.value if isinstance(padding, ast.Assign) else None
        layers: ast.Tuple = chain.args[1]  # type: ignore[assignment]
        if not isinstance(call, ast.Call) or len(call.args) != 2 or call.keywords:
            return False
        name, layer = call.args
        target = target_of(padding)
        names = [ast.dump(ast.Name(target or "", ast.Load()))] * 2
        if (
            target is None
            or [ast.dump(name), ast.dump(chain.args[0])] != names
            or ast.dump(layer) != ast.dump(layers.elts[0])
            or not self._wanted((PAD, path_of(call.func), path_of(layer)))
        ):
            return False
        pad = call.func if condition is None else ast.IfExp(condition, call.func, none())
        chain.keywords.append(ast.keyword("pad", pad))
        return True

    # --- residuals -------------------------------------------------------------------------------

    def _with_residuals(self, statements: list[ast.stmt]) -> list[ast.stmt]:
        result: list[ast.stmt] = []
        while statements:
            found = self._residual(statements)
            if found is None:
                result.append(statements.pop(0))
            else:
                new, used = found
                result.append(new)
                del statements[:used]
        return result

    def _residual(self, statements: list[ast.stmt]) -> tuple[ast.stmt, int] | None:
        """What the first statements become, and how many, where a residual is added to the first's
        result."""
        head, between = statements[0], 0
        own = own_sum(head)
        if own is not None:  # return x + self.layers(x)
            added, layers, argument, pad = own
        else:
            called = called_in(head)
            name = target_of(head)
            if called is None or name is None:
                return None
            layers, argument, pad = called
            between = 1
            while between < len(statements) and is_apart(statements[between], name, argument):
                between += 1
            found = sum_of(statements[between:], name)
            if found is None:
                return None
            added = found
        return self._in_one_step(statements, between, added, layers, argument, pad)

    def _in_one_step(
        self,
        statements: list[ast.stmt],
        between: int,
        added: Sum,
        layers: list[ast.expr],
        argument: ast.expr,
        pad: list[ast.keyword],
    ) -> tuple[ast.stmt, int] | None:
        used, groups = between + added.used, groups_in(statements[1:between])
        paths = [path_of(layer) for layer in layers]
        after = () if added.after is None else path_of(added.after)
        where = self._under if added.where is None else path_of(added.where)
        if not all(self._wanted((APART, *group)) for group in groups):
            return None
        if not all(paths) or not self._wanted((TAIL, *paths, after, where)):
            return None
        layer_tuple: ast.expr = ast.Tuple(layers, ast.Load())
        rest = [added.after or none(), own_name(added.add)]
        value = ast.Call(
            own_name("_with_residual"), [argument, layer_tuple, added.residual, *rest], list(pad)
        )
        new: ast.stmt
        if added.target is None:
            new = ast.Return(value)
        else:
            new = ast.Assign([ast.Name(added.target, ast.Store())], value)
        takes: ast.expr = ast.Call(own_name("_takes"), [layer_tuple, added.after or none()], [])
        if groups:
            # By name: where they are not called, they need not be there.
            alone = ast.Call(own_name("_leave_alone"), [ast.Constant(tuple(groups))], [])  # type: ignore[arg-type]
            takes = ast.BoolOp(ast.And(), [alone, takes])
        if added.where is not None:
            takes = ast.BoolOp(ast.And(), [added.where, takes])
        body = [*statements[1:between], new]
        branch = ast.If(takes, copy.deepcopy(body), copy.deepcopy(statements[:used]))
        return ast.copy_location(branch, statements[0]), used


# Which argument the layers are.
_LAYERS: dict[Path, int] = {
    ("self", "_convolved"): 1,
    ("self", "_with_residual"): 1,
    ("self", "_takes"): 0,
}


class Direct(ast.NodeTransformer):
    """Has the layers of a chain looked up where modules keep them: ``self.conv`` takes torch's
    ``__getattr__``, which is as dear as all that is looked at in a layer."""

    def __init__(self, base: type) -> None:
        self._base = base

    def visit_Call(self, call: ast.Call) -> ast.AST:
        at = _LAYERS.get(path_of(call.func))
        if at is not None:
            layers: ast.Tuple = call.args[at]  # type: ignore[assignment]
            layers.elts = [self._direct(layer) for layer in layers.elts]
        return self.generic_visit(call)

    def _direct(self, layer: ast.expr) -> ast.expr:
        path = path_of(layer)
        if len(path) != 2 or path[0] != "self" or hasattr(self._base, path[1]):
            return layer
        get = ast.Attribute(own_name("_modules"), "get", ast.Load())
        return ast.BoolOp(ast.Or(), [ast.Call(get, [ast.Constant(path[1])], []), layer])
