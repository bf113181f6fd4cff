"""Poolings of images in channels_last, by this library's ops."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.fx import Graph, Node

from pybigmodel._graph.layout import carries
from pybigmodel._graph.nodes import bound, function_of, number, numbers, tensor_of, value_of
from pybigmodel.ops._checks import FLOAT_DTYPES
from pybigmodel.ops._conv_geometry import is_channels_last, per_axis

_ops = torch.ops.pybigmodel
_MEANS = frozenset((torch.mean, "mean"))


class Pool(NamedTuple):
    op: Any
    x: Node
    how: list[Any]  # the op's arguments between the image and the layout
    flat: bool = False  # whether the result has no image axes


def lower_pools(graph: Graph, turned: list[Node]) -> None:
    """Put the ops there. turned: the nodes whose result is in channels_last where torch's would not
    be; those that are made here come to it."""
    images = set(turned)
    for node in list(graph.nodes):
        pool = _pool_of(node)
        if pool is not None and (pool.x in images or is_channels_last(value_of(pool.x))):
            new = _lowered(graph, node, pool)
            if _is_turned(new):
                turned.append(new)
                images.add(new)
        elif not images.isdisjoint(node.all_input_nodes) and carries(node):
            images.add(node)


def _lowered(graph: Graph, node: Node, pool: Pool) -> Node:
    y = value_of(node)
    # Of one pixel both layouts are the same memory.
    last = not pool.flat and (is_channels_last(y) or tuple(y.shape[2:]) != (1, 1))
    with graph.inserting_before(node):
        new = graph.call_function(pool.op, (pool.x, *pool.how, last))
        new.meta = node.meta.copy()
        result = graph.call_method("flatten", (new, 1)) if pool.flat else new
    if pool.flat:
        result.meta = node.meta.copy()
        new.meta["example_value"] = y.unsqueeze(-1).unsqueeze(-1)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return result


def _is_turned(node: Node) -> bool:
    return bool(node.args[-1] is True) and not is_channels_last(value_of(node))


def _pool_of(node: Node) -> Pool | None:
    target = function_of(node)
    if target in (F.max_pool2d, torch.max_pool2d):
        found = _max_of(node)
    elif target is F.avg_pool2d:
        found = _avg_of(node)
    elif target is F.adaptive_avg_pool2d:
        found = _adaptive_of(node)
    else:
        found = _mean_of(node) if target in _MEANS else None
    if found is None:
        return None
    x, y = tensor_of(found.x), tensor_of(node)
    fits = x is not None and y is not None and x.dtype == y.dtype and x.dtype in FLOAT_DTYPES
    return found if fits and x.dim() == 4 and not y.requires_grad else None  # type: ignore[union-attr]


def _max_of(node: Node) -> Pool | None:
    names: dict[str, Any] = dict.fromkeys(("input", "kernel_size", "stride"))
    rest = {"padding": 0, "dilation": 1, "ceil_mode": False, "return_indices": False}
    args = bound(node, **(names | rest))
    if args is None or args["return_indices"] is not False:
        return None
    windows, spread = _windows(args), numbers(args["dilation"])
    if windows is None or spread is None:
        return None
    how = [*windows, per_axis("max_pool2d", "dilation", spread, 2), bool(args["ceil_mode"])]
    return Pool(_ops.max_pool2d.default, args["input"], how)


def _avg_of(node: Node) -> Pool | None:
    names: dict[str, Any] = dict.fromkeys(("input", "kernel_size", "stride"))
    rest = {"padding": 0, "ceil_mode": False, "count_include_pad": True, "divisor_override": None}
    args = bound(node, **(names | rest))
    windows = None if args is None else _windows(args)
    if args is None or windows is None:
        return None
    divisor = 0 if args["divisor_override"] is None else number(args["divisor_override"])
    if divisor is None:
        return None
    how = [*windows, bool(args["ceil_mode"]), bool(args["count_include_pad"]), divisor]
    return Pool(_ops.avg_pool2d.default, args["input"], how)


def _windows(args: dict[str, Any]) -> list[list[int]] | None:
    """Kernel, stride and padding."""
    kernel, padding = numbers(args["kernel_size"]), numbers(args["padding"])
    if kernel is None or padding is None:
        return None
    given = args["stride"]
    stride = kernel if given is None or given in ([], ()) else numbers(given)
    if stride is None:
        return None
    return [per_axis("pool2d", "window", entry, 2) for entry in (kernel, stride, padding)]


def _adaptive_of(node: Node) -> Pool | None:
    args = bound(node, input=None, output_size=None)
    y = value_of(node)
    if args is None or y is None or not all(type(size) is int and size for size in y.shape[-2:]):
        return None
    return Pool(_ops.adaptive_avg_pool2d.default, args["input"], [list(y.shape[-2:])])


def _mean_of(node: Node) -> Pool | None:
    """Over both axes of an image."""
    args = bound(node, input=None, dim=None, keepdim=False, dtype=None)
    if args is None or args["dtype"] is not None or not isinstance(args["dim"], Sequence):
        return None
    axes = sorted(axis % 4 for axis in args["dim"] if isinstance(axis, int))
    if axes != [2, 3] or len(args["dim"]) != 2 or not isinstance(args["keepdim"], bool):
        return None
    x = tensor_of(args["input"])
    # Of no pixels it is NaN, which the op refuses.
    if x is None or x.dim() != 4 or not all(size > 0 for size in x.shape[2:]):
        return None
    op = _ops.adaptive_avg_pool2d.default
    return Pool(op, args["input"], [[1, 1]], flat=not args["keepdim"])
