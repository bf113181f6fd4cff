"""ONNX models of one linear layer, for ONNX Runtime and OpenVINO."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path

import numpy as np
import onnx
from onnx import helper
from shapes import Product

from peers.onnx_graph import FLOAT, asymmetric, serialized

# What ONNX Runtime and OpenVINO of the last years read.
_OPSET, _IR_VERSION = 17, 9


def _model(problem: Product, nodes: list[onnx.NodeProto], **constants: np.ndarray) -> bytes:
    return serialized(
        nodes,
        {"x": ([problem.m, problem.k], FLOAT)},
        {"y": ([problem.m, problem.n], FLOAT)},
        opset=_OPSET,
        ir_version=_IR_VERSION,
        constants=constants,
    )


def _product(a: str, b: str) -> list[onnx.NodeProto]:
    return [helper.make_node("MatMul", [a, b], ["t"]), helper.make_node("Add", ["t", "b"], ["y"])]


def quantized_weight(problem: Product) -> tuple[np.ndarray, np.ndarray]:
    """Symmetric per channel: int8 (K, N), scale (N,)."""
    weight = problem.data.weight.numpy()
    scale = (np.abs(weight).max(1) / 127).astype(np.float32)
    quantized = np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)
    return np.ascontiguousarray(quantized.T), scale


def fp32(problem: Product) -> bytes:
    weight = np.ascontiguousarray(problem.data.weight.numpy().T)
    return _model(problem, _product("x", "w"), w=weight, b=problem.data.bias.numpy())


def weight_only(problem: Product) -> bytes:
    """x · dequantised int8 weight."""
    quantized, scale = quantized_weight(problem)
    dequantize = helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1)
    return _model(
        problem,
        [dequantize, *_product("x", "w")],
        q=quantized,
        s=scale,
        z=np.zeros(problem.n, np.int8),
        b=problem.data.bias.numpy(),
    )


def static(problem: Product) -> bytes:
    """QDQ: the activation's range is known beforehand (here: of this very input, the best case)."""
    quantized, scale = quantized_weight(problem)
    x_scale, x_zero = asymmetric(problem.data.x)
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "xs", "xz"], ["xd"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["w"], axis=1),
        *_product("xd", "w"),
    ]
    return _model(
        problem,
        nodes,
        xs=x_scale,
        xz=x_zero,
        q=quantized,
        s=scale,
        z=np.zeros(problem.n, np.int8),
        b=problem.data.bias.numpy(),
    )


def dynamic(problem: Product) -> bytes:
    """onnxruntime.quantization.quantize_dynamic: activations per tensor, weights per channel."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().setLevel(logging.ERROR)  # it recommends a pre-processing for large models
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        source.write_bytes(fp32(problem))
        quantize_dynamic(
            source,
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"MatMulConstBOnly": True},
        )
        return target.read_bytes()
