"""The ops of one run of a model, as a program that runs them again without the model's code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from pybigmodel._torch_private import recording

Program: TypeAlias = Callable[..., list[Any]]
_MAYBE = "which may be another one at the next call"
_REFUSED = {
    torch.Tag.data_dependent_output: f"reads a value of a tensor ({{}}), {_MAYBE}",
    torch.Tag.dynamic_output_shape: "gives a tensor whose shape depends on values ({})",
}
# What reads values without an op.
_READING = frozenset((Tensor.tolist, Tensor.numpy, Tensor.__array__))
_NORMS = ("aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm")


def storage_of(tensor: Tensor) -> int | None:
    """What identifies its memory; None for a tensor that has none of its own."""
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else None


class _Calls(TorchFunctionMode):
    """Sees what no op sees."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in _READING or (
            func in (torch.tensor_split, Tensor.tensor_split)
            and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args[1:], kwargs)))
        ):
            raise RuntimeError(
                f"freeze: the model reads a value of a tensor ({func.__name__}), {_MAYBE}"
            )
        return func(*args, **(kwargs or {}))


class Recorder(TorchDispatchMode):
    """Makes a graph of what is called: `inputs` are its arguments, other tensors constants."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._graph = Graph()
        self.constants: dict[str, Tensor] = {}
        self._nodes: dict[int, Node] = {}
        self._kept: list[Tensor] = []  # or another tensor might get the id of one that went
        self._made: set[int | None] = set()  # storages of inputs and results
        self._own: set[int | None] = set()  # and of constants
        self._calls = _Calls()
        for i, tensor in enumerate(inputs):
            node = self._graph.placeholder(f"x{i}")
            if id(tensor) not in self._nodes:
                self._know(tensor, node)
                self._made.add(storage_of(tensor))

    def __enter__(self) -> Recorder:
        recording.depth = getattr(recording, "depth", 0) + 1
        super().__enter__()  # type: ignore[no-untyped-call]
        self._calls.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._calls.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        recording.depth -= 1

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        _check_known(func, args, kwargs)
        if func is torch.ops.aten.lift_fresh.default:  # a constant in the code, new at each call
            func = torch.ops.aten.clone.default
        # Before the call, which may change what the lists among them hold.
        node = self._graph.call_function(func, *self._read((_with_defaults(func, args), kwargs)))
        self._check_written(func, args, kwargs)
        result = func(*args, **kwargs)
        self._know_all(result, node)
        return result

    def program(self, outputs: Sequence[Tensor]) -> Program:
        """A function of the inputs that gives such outputs."""
        from pybigmodel._graph.sequence import join

        self._graph.output(self._read(list(outputs)))
        _drop_unused(self._graph)
        join(self._graph)
        return _compiled(self._graph, self.constants)

    def _know_all(self, result: Any, node: Node) -> None:
        if isinstance(result, Tensor):
            self._know(result, node)
            if storage_of(result) not in self._own:
                self._made.add(storage_of(result))
        elif isinstance(result, tuple | list):
            for i, part in enumerate(result):
                self._know_all(part, self._graph.call_function(_item, (node, i)))

    def _know(self, tensor: Tensor, node: Node) -> None:
        self._nodes[id(tensor)] = node
        self._kept.append(tensor)

    def _read(self, values: Any) -> Any:
        return tree_map(lambda v: self._node(v) if isinstance(v, Tensor) else v, values)

    def _node(self, tensor: Tensor) -> Node:
        known = self._nodes.get(id(tensor))
        if known is not None:
            return known
        storage = storage_of(tensor)
        if storage is not None and storage in self._made:
            raise RuntimeError(
                "freeze: the model makes a tensor of another without an op that could be recorded, "
                "as torch.nn.Parameter(x) does"
            )
        name = f"c{len(self.constants)}"
        self.constants[name] = tensor.detach()
        first = next(iter(self._graph.nodes))
        with self._graph.inserting_before(first):
            node = self._graph.create_node("get_attr", name)
        self._know(tensor, node)
        self._own.add(storage)
        return node

    def _check_written(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        written = [
            leaf
            for i, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
            for leaf in tree_leaves(args[i] if i < len(args) else kwargs.get(argument.name))
        ]
        if func._schema.name in _NORMS and args[5]:  # statistics, of which the schema is silent
            written += args[3:5]
        if any(isinstance(t, Tensor) and storage_of(t) in self._own for t in written):
            raise RuntimeError(
                f"freeze: the model writes to a tensor of its own ({func}), which each call would "
                "change again"
            )


def _check_known(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """That the same ops on other values give what the model would."""
    if func is torch.ops.aten.index.Tensor:  # of integers the shape is theirs
        masks = (torch.bool, torch.uint8)
        if not any(isinstance(i, Tensor) and i.dtype in masks for i in args[1]):
            return
    if func is torch.ops.aten.repeat_interleave.Tensor and kwargs.get("output_size") is not None:
        return
    for tag, reason in _REFUSED.items():
        if tag in func.tags:
            raise RuntimeError(f"freeze: the model {reason.format(func)}")


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
