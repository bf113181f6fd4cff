"""OpenVINO's poolings: fp32, bf16 and bytes, in and out."""

from __future__ import annotations

from pool_results import WHOLE
from pool_shapes import Pooling

from peers import Contender, onnx_pool
from peers.openvino_images import contender


def build(problem: Pooling) -> Contender:
    """Windows of floats in planes: a model of a single pooling copies images of channels_last to
    them, which takes as long again. Within a model it has the layout of the convolution before."""
    model = onnx_pool.plain(problem)
    if problem.op == WHOLE or problem.precision == "int8":
        return contender(problem, model, problem.precision)
    return contender(problem, model, problem.precision, "in planes", channels_last=False)
