"""From Dynamo's graph to something that can be called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.nn import Parameter

from pybigmodel._graph.chains import Surroundings, find
from pybigmodel._graph.layout import give_back_strides, may_be_turned
from pybigmodel._graph.lower import Lowering
from pybigmodel._graph.nodes import Conv, Options, nothing_dropped
from pybigmodel._graph.pools import lower_pools
from pybigmodel._graph.sequence import join
from pybigmodel._graph.weights import Recipe, WithPacked
from pybigmodel._graph.writes import Writes, is_transformed
from pybigmodel.ops._common import precision_code


def options_of(given: dict[str, Any] | None) -> Options:
    """Checked.

    Raises:
        ValueError, TypeError: naming what is wrong.
    """
    known = Options._fields
    unknown = sorted(set(given or ()) - set(known))
    if unknown:
        raise ValueError(
            f"torch.compile(backend='pybigmodel'): unknown options {', '.join(map(repr, unknown))};"
            f" there are {', '.join(map(repr, known))}"
        )
    found = dict(given or ())
    for name in ("exact", "channels_last"):
        if not isinstance(found.get(name, False), bool):
            raise TypeError(
                f"torch.compile(backend='pybigmodel'): option {name!r} must be a bool, got "
                f"{found[name]!r}"
            )
    if "precision" in found:
        found["precision"] = precision_code(found["precision"])
    return Options(**found)


def compiled(
    module: GraphModule, inputs: list[Any], options: Options, mode: str | None
) -> Callable[..., Any]:
    import torch._inductor as inductor  # takes seconds

    module = _copied(module)
    recipes, examples = rewritten(module, inputs, options)
    join(module.graph)
    read = _drop_unread(module.graph, inputs)
    inputs = [inputs[i] for i in read]
    module.recompile()
    patches = inductor.list_mode_options(mode) if mode else None
    inner = inductor.compile(module, [*inputs, *examples], options=patches)
    return _called(WithPacked(inner, recipes, read))


def _drop_unread(graph: Graph, inputs: list[Any]) -> list[int]:
    """Take the tensors that nothing reads any more from the graph's own inputs: each costs a little
    at every call. The places of those that stay."""
    read = []
    for i, (node, given) in enumerate(zip(graph.find_nodes(op="placeholder"), inputs)):  # noqa: B905
        if node.users or not isinstance(given, torch.Tensor):
            read.append(i)
        else:
            graph.erase_node(node)
    return read


def _copied(module: GraphModule) -> GraphModule:
    """Dynamo goes on to read the inputs of its graph, which must not get more."""
    graph = Graph()
    known: dict[Node, Node] = {}
    graph.output(graph.graph_copy(module.graph, known))
    for node in module.graph.find_nodes(op="placeholder"):
        vars(known[node]).update(_dynamo_source=getattr(node, "_dynamo_source", None))
    new = GraphModule(module, graph)
    new.meta = module.meta
    sources = getattr(module, "_param_name_to_source", None)
    if sources is not None:
        vars(new).update(_param_name_to_source=sources)
    return new


def _called(graph: WithPacked) -> Callable[..., Any]:
    def call(*args: Any) -> Any:  # Dynamo wants a function
        return graph(*args)

    return call


def rewritten(
    module: GraphModule, inputs: list[Any], options: Options
) -> tuple[list[Recipe], list[torch.Tensor]]:
    """Change the graph in place: the packed weights that it takes behind its inputs, and what they
    will look like."""
    graph = module.graph
    if is_transformed(graph):
        return [], []
    writes = Writes(graph)
    for node in list(graph.nodes):
        kept = nothing_dropped(node)
        # To Dynamo's fake tensors the two are apart, in truth they are one.
        if kept is not None and not writes.ever(kept) and not writes.ever(node):
            node.replace_all_uses_with(kept)
            graph.erase_node(node)
    places = graph.find_nodes(op="placeholder")
    parameters = [n for n, given in zip(places, inputs, strict=True) if type(given) is Parameter]
    around = Surroundings(writes, frozenset(parameters))
    chains = find(graph, options, around)
    convolutions = [chain.last for chain in chains if isinstance(chain.product, Conv)]
    turns = options.channels_last and may_be_turned(graph, convolutions, writes)
    lowering = Lowering(graph, around, turns)
    for chain in chains:
        lowering.lower(chain)
    lower_pools(graph, lowering.turned)
    give_back_strides(graph, lowering.turned)
    graph.lint()
    return lowering.recipes, lowering.examples
