"""ONNX models of one pooling, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper
from pool_results import MAX, WHOLE
from pool_shapes import Pooling

from peers.onnx_graph import FLOAT, MICROSOFT, UINT8, serialized

# What ONNX Runtime and OpenVINO of the last years read.
_OPSET, _IR_VERSION = 17, 9
_BLOCKED = "com.microsoft.nchwc"  # what ONNX Runtime makes of convolutions' neighbours


def plain(problem: Pooling) -> bytes:
    """In planes, of floats or bytes."""
    return _model(problem, _node(problem))


def blocked(problem: Pooling) -> bytes:
    """From and to ONNX Runtime's blocks of channels."""
    return _model(problem, _node(problem, domain=_BLOCKED))


def bytes_channels_last(problem: Pooling) -> bytes:
    """What ONNX Runtime makes of a max pooling between its int8 convolutions."""
    node = helper.make_node("NhwcMaxPool", ["x"], ["y"], domain=MICROSOFT, **_windows(problem))
    return _model(problem, node, channels_last=True)


def _node(problem: Pooling, domain: str | None = None) -> onnx.NodeProto:
    if problem.op == WHOLE:
        return helper.make_node("GlobalAveragePool", ["x"], ["y"], domain=domain)
    windows = _windows(problem)
    if problem.op == MAX:
        return helper.make_node("MaxPool", ["x"], ["y"], domain=domain, **windows)
    return helper.make_node(
        "AveragePool", ["x"], ["y"], domain=domain, count_include_pad=1, **windows
    )


def _windows(problem: Pooling) -> dict[str, Any]:
    return {
        "kernel_shape": [problem.k] * 2,
        "strides": [problem.s] * 2,
        "pads": [problem.padding] * 4,
    }


def _model(problem: Pooling, node: onnx.NodeProto, channels_last: bool = False) -> bytes:
    element = UINT8 if problem.precision == "int8" else FLOAT
    x, y = problem.input_shape, problem.output_shape
    if channels_last:
        x, y = ((b, h, w, c) for b, c, h, w in (x, y))
    return serialized(
        [node], {"x": (x, element)}, {"y": (y, element)}, opset=_OPSET, ir_version=_IR_VERSION
    )
