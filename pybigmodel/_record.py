"""The ops of one run of a model, as a program that runs them again without the model's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pybigmodel._graph.sequence import join
from pybigmodel._torch_private import recording

Program: TypeAlias = Callable[..., list[Any]]
_REFUSED = {
    torch.Tag.data_dependent_output: "reads a value of a tensor",
    torch.Tag.dynamic_output_shape: "gives a tensor whose shape depends on values",
}


class Recorder(TorchDispatchMode):
    """Makes a graph of what is called: `inputs` are its arguments, other tensors constants."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = Graph()
        self.constants: dict[str, Tensor] = {}
        self._nodes: dict[int, Node] = {}
        self._own: set[int] = set()  # ids of constants, and of views of them
        self._kept: list[Tensor] = []  # or another tensor might get the id of one that went
        for i, tensor in enumerate(inputs):
            self._know(tensor, self._graph.placeholder(f"x{i}"))

    def __enter__(self) -> Recorder:
        recording.depth = getattr(recording, "depth", 0) + 1
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        recording.depth -= 1
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tag, reason in _REFUSED.items():
            if tag in func.tags:
                raise RuntimeError(f"freeze: the model {reason} ({func}), which may be another one")
        if func is torch.ops.aten.lift_fresh.default:  # a constant in the code, new at each call
            func = torch.ops.aten.clone.default
        # Before the call, which may change what the lists among them hold.
        node = self._graph.call_function(func, *self._read((_with_defaults(func, args), kwargs)))
        if func._schema.is_mutable:
            self._check_written(func, args, kwargs)
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._know(result, node)
        else:
            for i, tensor in enumerate(result if isinstance(result, tuple | list) else ()):
                if isinstance(tensor, Tensor):
                    self._know(tensor, self._graph.call_function(_item, (node, i)))
        if any(returned.alias_info is not None for returned in func._schema.returns) and any(
            id(leaf) in self._own for leaf in tree_leaves((args, kwargs))
        ):
            self._own.update(id(leaf) for leaf in tree_leaves(result))
        return result

    def program(self, outputs: Sequence[Tensor]) -> Program:
        """A function of the inputs that gives such outputs."""
        self._graph.output(self._read(list(outputs)))
        _drop_unused(self._graph)
        join(self._graph)
        return _compiled(self._graph, self.constants)

    def _know(self, tensor: Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)

    def _read(self, values: Any) -> Any:
        return tree_map(lambda v: self._node(v) if isinstance(v, Tensor) else v, values)

    def _node(self, tensor: Tensor) -> Node:
        known = self._nodes.get(id(tensor))
        if known is not None:
            return known
        name = f"c{len(self.constants)}"
        self.constants[name] = tensor.detach()
        first = next(iter(self._graph.nodes))
        with self._graph.inserting_before(first):
            node = self._graph.create_node("get_attr", name)
        self._know(tensor, node)
        self._own.add(id(tensor))
        return node

    def _check_written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for i, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            for tensor in tree_leaves(value):
                if id(tensor) in self._own:
                    raise RuntimeError(
                        f"freeze: the model writes to a tensor of its own ({func}), which each "
                        "call would change again"
                    )


def _item(values: Sequence[Any], i: int) -> Any:
    return values[i]


def _with_defaults(func: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """All positional arguments: the dispatcher leaves out those at the end that are defaults."""
    rest = func._schema.arguments[len(args) :]
    more = []
    for argument in rest:
        if argument.kwarg_only or not argument.has_default_value():
            break
        more.append(argument.default_value)
    return (*args, *more)


def _drop_unused(graph: Graph) -> None:
    """What nothing reads and writes nothing."""
    for node in reversed(list(graph.nodes)):
        schema = getattr(node.target, "_schema", None)
        acts = schema is not None and (schema.is_mutable or not schema.returns)
        if node.op not in ("placeholder", "output") and not node.users and not acts:
            graph.erase_node(node)


# --- as source -----------------------------------------------------------------------------------


def _compiled(graph: Graph, constants: dict[str, Tensor]) -> Program:
    """One line a call; what is not read any more is let go."""
    space: dict[str, Any] = {}
    lines: list[str] = []
    arguments: list[str] = []
    last: dict[Node, Node] = {}
    for node in graph.nodes:
        for read in node.all_input_nodes:
            last[read] = node
    for node in graph.nodes:
        if node.op == "placeholder":
            arguments.append(node.name)
        elif node.op == "get_attr":
            space[node.name] = constants[node.target]
        elif node.op == "output":
            lines.append(f"return {_source(node.args[0], space)}")
        else:
            function = f"f{len(space)}"
            space[function] = node.target
            values = [_source(value, space) for value in node.args]
            values += [f"{name}={_source(value, space)}" for name, value in node.kwargs.items()]
            lines.append(f"{node.name} = {function}({', '.join(values)})")
            done = [read.name for read in node.all_input_nodes if last[read] is node]
            gone = [name for name in done if name not in space]
            if gone:
                lines.append(f"del {', '.join(gone)}")
    body = "\n    ".join(lines)
    exec(f"def program({', '.join(arguments)}):\n    {body}\n", space)
    program: Program = space["program"]
    return program


def _source(value: Any, space: dict[str, Any]) -> str:
    """An expression; what is not written in a word becomes a name."""
    if isinstance(value, Node):
        return value.name
    if isinstance(value, list | tuple) and any(isinstance(v, Node) for v in tree_leaves(value)):
        entries = ", ".join(_source(entry, space) for entry in value)
        return f"[{entries}]"
    if value is None or isinstance(value, bool | int | str):
        return repr(value)
    name = f"k{len(space)}"
    space[name] = value
    return name
