"""ONNX models of one convolution, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from conv_problem import ConvProblem
from conv_shapes import Convolution
from conv_transpose_shapes import TransposedConvolution
from onnx import helper

from peers.onnx_graph import FLOAT, MICROSOFT, asymmetric, serialized

# What ONNX Runtime and OpenVINO of the last years read.
_OPSET, _IR_VERSION = 17, 9


def fp32(problem: ConvProblem) -> bytes:
    data = problem.data
    kind = "ConvTranspose" if isinstance(problem, TransposedConvolution) else "Conv"
    convolution = helper.make_node(kind, ["x", "w", "b"], ["y"], **_attributes(problem))
    constants = {"w": data.weight.numpy(), "b": data.bias.numpy()}
    return _model(problem, [convolution], constants)


def static(problem: Convolution) -> bytes:
    """QDQ: the activation's range is known beforehand (here: of this very input, the best case)."""
    quantized, scale = _quantized_weight(problem)
    x_scale, x_zero = asymmetric(problem.data.x)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=0),
        helper.make_node("Conv", ["xd", "w", "b"], ["y"], **_attributes(problem)),
    ]
    constants = {
        "xs": x_scale,
        "xz": x_zero,
        "q": quantized,
        "s": scale,
        "z": np.zeros(problem.n, np.int8),
        "b": problem.data.bias.numpy(),
    }
    return _model(problem, nodes, constants)


def static_channels_last(problem: Convolution) -> bytes:
    """The same in what ONNX Runtime makes of QDQ within a model; its output is int8 as well."""
    quantized, scale = _quantized_weight(problem)
    x_scale, x_zero = asymmetric(problem.data.x)
    y_scale, y_zero = asymmetric(problem.data.exact)
    names = ["xq", "xs", "xz", "q", "s", "z", "ys", "yz", "b"]
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node(
            "QLinearConv",
            names,
            ["yq"],
            domain=MICROSOFT,
            channels_last=1,
            **_attributes(problem),
        ),
        helper.make_node("DequantizeLinear", ["yq", "ys", "yz"], ["y"]),
    ]
    bias = np.rint(problem.data.bias.numpy() / (x_scale * scale)).astype(np.int32)
    constants = {
        "xs": x_scale,
        "xz": x_zero,
        "q": quantized,
        "s": scale,
        "z": np.zeros(problem.n, np.int8),
        "ys": y_scale,
        "yz": y_zero,
        "b": bias,
    }
    return _model(problem, nodes, constants, channels_last=True)


def _attributes(problem: ConvProblem) -> dict[str, Any]:
    attributes = {
        "kernel_shape": [problem.k] * 2,
        "strides": [problem.s] * 2,
        "pads": [problem.geometry["padding"]] * 4,
        "group": problem.groups,
    }
    if isinstance(problem, TransposedConvolution):
        attributes["output_padding"] = [problem.output_padding] * 2
    return attributes


def _model(
    problem: ConvProblem,
    nodes: list[onnx.NodeProto],
    constants: dict[str, np.ndarray],
    channels_last: bool = False,
) -> bytes:
    x, y = problem.input_shape, problem.output_shape
    if channels_last:
        x, y = ((b, h, w, c) for b, c, h, w in (x, y))
    return serialized(
        nodes,
        {"x": (x, FLOAT)},
        {"y": (y, FLOAT)},
        opset=_OPSET,
        ir_version=_IR_VERSION,
        constants=constants,
    )


def _quantized_weight(problem: Convolution) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric per output channel: int8 (N, C, K, K), scale (N,)."""
    weight = problem.data.weight.numpy()
    scale = (np.abs(weight).max((1, 2, 3)) / 127).astype(np.float32)
    rounded = np.rint(weight / scale[:, None, None, None])
    return np.clip(rounded, -127, 127).astype(np.int8), scale
