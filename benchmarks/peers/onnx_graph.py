"""Small ONNX models, built with onnx.helper for ONNX Runtime and OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

MICROSOFT = "com.microsoft"  # ONNX Runtime's own ops
FLOAT, INT32, UINT8 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.UINT8

Shapes = Mapping[str, tuple[Sequence[int], int]]  # by name: dimensions and element type


def serialized(
    nodes: Sequence[onnx.NodeProto],
    inputs: Shapes,
    outputs: Shapes,
    *,
    opset: int,
    ir_version: int,
    constants: Mapping[str, np.ndarray] | None = None,
) -> bytes:
    graph = helper.make_graph(
        nodes,
        "graph",
        _values(inputs),
        _values(outputs),
        [numpy_helper.from_array(value, name) for name, value in (constants or {}).items()],
    )
    domains = {"": opset} | {node.domain: 1 for node in nodes if node.domain}
    imports = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
    model = helper.make_model(graph, opset_imports=imports)
    model.ir_version = ir_version
    onnx.checker.check_model(model)
    return bytes(model.SerializeToString())


def _values(shapes: Shapes) -> list[onnx.ValueInfoProto]:
    return [
        helper.make_tensor_value_info(name, element, list(dimensions))
        for name, (dimensions, element) in shapes.items()
    ]


def asymmetric(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Scale and zero point of uint8 over the range of x, as scalars."""
    low, high = min(float(x.min()), 0.0), max(float(x.max()), 0.0)
    scale = (high - low) / 255
    return np.array(scale, np.float32), np.array(round(-low / scale), np.uint8)
