"""OpenVINO's convolutions: fp32, bf16 in and out, int8."""

from __future__ import annotations

from conv_problem import ConvProblem
from conv_shapes import Convolution

from peers import Contender, onnx_conv
from peers.openvino_images import contender


def build(problem: ConvProblem) -> Contender:
    return contender(problem, onnx_conv.fp32(problem), problem.precision)


def build_static(problem: Convolution) -> Contender:
    note = "the activation's scale is known beforehand"
    return contender(problem, onnx_conv.static(problem), "fp32", note)
