"""Where a graph writes to memory: what may be computed later than it stands, and what is a weight.

Tensors that share memory share the storage of the fake tensors that Dynamo made for them.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from pybigmodel._graph.nodes import function_of, value_of, written_by
from pybigmodel._torch_private import size_hint, storage_of

_SWITCHES = frozenset(
    (
        *("_set_grad_enabled", "_enter_autocast", "_exit_autocast"),
        *("_enter_inference_mode", "_exit_inference_mode"),
    )
)


class Writes:
    """Of one graph, as Dynamo made it."""

    def __init__(self, graph: Graph) -> None:
        self.index: dict[Node, int] = {}
        self._part: dict[Node, int] = {}
        self._to: dict[int, list[int]] = defaultdict(list)  # by storage: where it is written to
        self.layouts: dict[int, set[Any]] = defaultdict(set)  # by storage
        part = 0
        for i, node in enumerate(graph.nodes):
            part += getattr(function_of(node), "__name__", "") in _SWITCHES
            self.index[node], self._part[node] = i, part
            for written in written_by(node):
                for storage in storages_of(written):
                    self._to[storage].append(i)
            for storage in storages_of(node):
                value = value_of(node)
                self.layouts[storage].add(tuple(map(size_hint, (*value.shape, *value.stride()))))

    def between(self, read: Node, first: Node, last: Node) -> bool:
        """Whether `read` may be another after `first` and before `last`."""
        begin, end = self.index[first], self.index[last]
        return any(begin < i < end for s in storages_of(read) for i in self._to.get(s, ()))

    def ever(self, read: Node) -> bool:
        """Whether the graph may write to it at all."""
        value = value_of(read)
        # The second is of what writes without a name that says so; views begin with a count.
        counted = isinstance(value, Tensor) and not value._is_view() and value._version > 0
        return counted or any(self._to.get(s) for s in storages_of(read))

    def together(self, *nodes: Node) -> bool:
        """Whether gradients and autocast are the same for all of them."""
        return len({self._part[node] for node in nodes}) == 1


def storages_of(node: Node) -> list[int]:
    value = value_of(node)
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return []
    storage = storage_of(value)
    return [] if storage is None else [storage]


def is_transformed(graph: Graph) -> bool:
    """Whether torch.func is at work, whose tensors do not say whether they are differentiated."""
    names = (getattr(function_of(node), "__name__", "") for node in graph.nodes)
    return any(name.endswith(("_increment_nesting", "_enter_dual_level")) for name in names)
