"""OpenVINO's convolution in channels_last, its own choice: fp32, bf16 in and out, int8."""

from __future__ import annotations

from collections.abc import Callable

import openvino
from conv_shapes import Convolution

from peers import Contender, Errors, onnx_conv
from peers.openvino_request import ELEMENTS, compiled, core, empty, from_torch, to_torch


def _channels_last(source: bytes, precision: str) -> openvino.Model:
    """The model from and to tensors of (B, H, W, C), which its convolution takes without a copy."""
    steps = openvino.preprocess.PrePostProcessor(core().read_model(source, b""))
    for end in (steps.input(), steps.output()):
        end.tensor().set_element_type(ELEMENTS[precision])
        end.tensor().set_layout(openvino.Layout("NHWC"))
        end.model().set_layout(openvino.Layout("NCHW"))
    return steps.build()


def _contender(problem: Convolution, source: bytes, precision: str, note: str = "") -> Contender:
    program = compiled(_channels_last(source, precision), problem.threads, precision)
    y = empty(program.output(0).shape, precision)

    def bound() -> Callable[[], object]:
        request = program.create_infer_request()
        request.set_input_tensor(0, from_torch(problem.data.x.permute(0, 2, 3, 1), precision))
        request.set_output_tensor(0, y)
        return request.infer

    calls = [bound() for _ in range(problem.copies)]

    def errors() -> Errors:
        calls[0]()
        return Errors.of([to_torch(y, precision).permute(0, 3, 1, 2)], [problem.data.exact])

    return Contender(calls, errors, note)


def build(problem: Convolution) -> Contender:
    return _contender(problem, onnx_conv.fp32(problem), problem.precision)


def build_static(problem: Convolution) -> Contender:
    note = "the activation's scale is known beforehand"
    return _contender(problem, onnx_conv.static(problem), "fp32", note)
