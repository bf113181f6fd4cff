"""Convolutions that follow one another in a graph, as one call."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, Node

from pybigmodel.nn._conv_plan import conv_packed_op

_sequence_op = torch.ops.pybigmodel.conv_sequence.default


def join(graph: Graph) -> None:
    """Make one call of every run of two or more: in Python each costs as much as a small
    convolution takes."""
    for run in list(_runs(graph)):
        _join(graph, run)


def _runs(graph: Graph) -> Iterator[list[Node]]:
    run: list[Node] = []
    for node in graph.nodes:
        if node.target is conv_packed_op and _is_fixed(node):
            run.append(node)
        else:
            if len(run) > 1:
                yield run
            run = []


def _is_fixed(node: Node) -> bool:
    """Whether its numbers are numbers: a graph may have symbols among them."""
    numbers: list[Any] = []
    for argument in (*node.args[2:4], *node.args[6:]):
        numbers += argument if isinstance(argument, (list, tuple)) else [argument]
    return all(isinstance(number, (int, float)) for number in numbers)


def _join(graph: Graph, run: list[Node]) -> None:
    tensors: list[Node] = []
    for node in run:
        tensors += [a for a in node.all_input_nodes if a not in run and a not in tensors]
    place = {node: i for i, node in enumerate([*tensors, *run])}
    program: list[int] = []
    slopes: list[float] = []
    for node in run:
        steps, slope = _step(node, place)
        program += steps
        slopes.append(slope)
    inside = set(run)
    outputs = [i for i, node in enumerate(run) if not inside.issuperset(node.users)]
    with graph.inserting_after(run[-1]):
        call = graph.call_function(_sequence_op, (tensors, program, slopes, outputs))
    call.meta["example_value"] = [run[i].meta.get("example_value") for i in outputs]
    with graph.inserting_after(call):
        for at, i in reversed(list(enumerate(outputs))):
            one = graph.call_function(operator.getitem, (call, at))
            one.meta = run[i].meta.copy()
            run[i].replace_all_uses_with(one, delete_user_cb=lambda user: user not in inside)
    for node in reversed(run):
        graph.erase_node(node)


def _step(node: Node, place: dict[Node, int]) -> tuple[list[int], float]:
    args: Any = node.args
    input, weight, channels, kernel, bias, residual, stride, padding, dilation = args[:9]
    groups, activation, slope, algorithm, channels_last = args[9:]
    read = [-1 if tensor is None else place[tensor] for tensor in (input, weight, bias, residual)]
    steps = [*read, channels, groups, activation, algorithm, int(channels_last), len(kernel)]
    for i in range(len(kernel)):
        steps += [kernel[i], stride[i], *padding[2 * i : 2 * i + 2], dilation[i]]
    return steps, float(slope)
