"""Images that convolutions give in channels_last where torch would not: turned back for whoever
may notice.

What computes the same of either layout passes it on. Everything else, and the caller, gets the
strides that torch would have given.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Graph, Node

from pybigmodel._graph.nodes import CONVOLUTIONS, PADS, function_of, value_of, written_by
from pybigmodel._graph.writes import Writes, storages_of
from pybigmodel._torch_private import size_hint
from pybigmodel.nn._conv_plan import conv_cached

# What gives the same values of any strides; where it gives another tensor, in strides of its own.
_FREE: frozenset[Any] = frozenset(
    (
        *(operator.add, operator.iadd, operator.sub, operator.isub, operator.mul, operator.imul),
        *(operator.truediv, operator.itruediv, operator.neg, operator.pow),
        *(torch.add, torch.sub, torch.mul, torch.div, torch.maximum, torch.minimum, torch.clamp),
        *(torch.relu, torch.relu_, torch.sigmoid, torch.tanh, torch.exp, torch.sqrt, torch.abs),
        *(F.relu, F.relu6, F.hardtanh, F.silu, F.gelu, F.hardswish, F.hardsigmoid, F.leaky_relu),
        *(F.elu, F.mish, F.softplus, F.sigmoid, F.tanh, F.prelu, F.dropout, F.dropout2d),
        *(F.batch_norm, F.group_norm, *PADS, F.interpolate, F.softmax, F.layer_norm),
        *(F.max_pool2d, F.max_pool3d, F.avg_pool2d, F.avg_pool3d),
        *(F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, F.adaptive_max_pool2d),
        *(torch.max_pool2d, torch.max_pool3d, F.linear),
        *(torch.cat, torch.concat, torch.mean, torch.sum, torch.amax, torch.flatten),
        *(torch.permute, torch.transpose, torch.reshape, torch.clone),
        *("add", "add_", "sub", "mul", "mul_", "div", "relu", "relu_", "sigmoid", "tanh", "clamp"),
        *("mean", "sum", "amax", "flatten", "reshape", "permute", "transpose", "clone", "float"),
        *("to", "contiguous"),
    )
)
# Of these the result may be the image itself.
_MAY_SHARE: frozenset[Any] = frozenset(
    (
        *(torch.flatten, torch.permute, torch.transpose, torch.reshape, F.dropout, F.dropout2d),
        *("flatten", "reshape", "permute", "transpose", "float", "to", "contiguous"),
        F.interpolate,
    )
)
_SIZES = frozenset(("size", "dim"))
# Their result has the strides that their arguments say.
_OURS = frozenset(
    getattr(torch.ops.pybigmodel, name).default
    for name in (
        *("conv", "conv_packed", "conv_cached", "linear", "linear_packed", "linear_cached"),
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
    )
)
# What is computed into memory of its own, in whatever layout.
_NEW = (_FREE - _MAY_SHARE) | _OURS | CONVOLUTIONS.keys() | {conv_cached}


def may_be_turned(graph: Graph, products: Iterable[Node], writes: Writes) -> bool:
    """Whether no call would write to a copy instead of the image, or to the image instead of a
    copy: what comes of the products is written to where it was computed, and by calls that take any
    layout."""
    images = set(products)
    holders: dict[int, list[Node]] = defaultdict(list)
    for node in graph.nodes:
        if not images.isdisjoint(node.all_input_nodes):
            images.add(node)
        for storage in storages_of(node):
            holders[storage].append(node)
    return all(
        _is_free(writer)
        and all(
            len(writes.layouts[s]) == 1 and _is_written_alone(holders[s])
            for s in storages_of(written)
        )
        for writer in graph.nodes
        for written in written_by(writer)
        if written in images
    )


def _is_written_alone(holders: list[Node]) -> bool:
    """Whether the nodes with one memory are what was computed into it, and calls that write there:
    whether others share it, as `contiguous` and views do, can be a matter of strides."""
    first, *rest = holders
    return function_of(first) in _NEW and not written_by(first) and all(map(written_by, rest))


def give_back_strides(graph: Graph, turned: Iterable[Node]) -> None:
    """Lay out what is not as Dynamo knows it before calls that may notice.

    turned: the convolutions whose result is.
    """
    other = set(turned)
    for node in list(graph.nodes):
        images = [image for image in node.all_input_nodes if image in other]
        if images and not _passes_on(node):
            with graph.inserting_before(node):
                for image in images:
                    node.replace_input_with(image, _as_torchs(graph, image))
        elif images and carries(node):
            other.add(node)


def carries(node: Node) -> bool:
    """Whether what it gives of an image that is turned may be turned too."""
    return function_of(node) not in _OURS and isinstance(value_of(node), Tensor)


def _is_free(node: Node) -> bool:
    return function_of(node) in _FREE and "out" not in node.kwargs


def _passes_on(node: Node) -> bool:
    """Whether it takes images of any strides, and what it gives can be turned back."""
    if function_of(node) in _OURS or function_of(node) in _SIZES:
        return True
    value = value_of(node)
    return _is_free(node) and isinstance(value, Tensor) and _order(value) is not None


def _order(value: Tensor) -> list[int] | None:
    """The axes from the outermost to the innermost in memory; None where there are gaps."""
    axes = list(range(value.dim()))
    if value.is_contiguous():
        return axes
    strides = [size_hint(stride) for stride in value.stride()]
    axes.sort(key=lambda axis: -strides[axis])
    return axes if value.permute(axes).is_contiguous() else None


def _as_torchs(graph: Graph, image: Node) -> Node:
    axes = _order(value_of(image))
    assert axes is not None
    if axes == sorted(axes):
        return graph.call_method("contiguous", (image,))
    there = graph.call_method("permute", (image, axes))
    laid_out = graph.call_method("contiguous", (there,))
    return graph.call_method("permute", (laid_out, [axes.index(i) for i in range(len(axes))]))
