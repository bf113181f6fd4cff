"""OpenVINO on images, in channels_last or in planes."""

from __future__ import annotations

from collections.abc import Callable

import openvino

from peers import Contender, Errors
from peers.images import ImageProblem
from peers.openvino_request import ELEMENTS, compiled, core, empty, from_torch, to_torch


def _model(source: bytes, precision: str, channels_last: bool) -> openvino.Model:
    """From and to tensors of this precision, of (B, H, W, C) or (B, C, H, W)."""
    steps = openvino.preprocess.PrePostProcessor(core().read_model(source, b""))
    for end in (steps.input(), steps.output()):
        end.tensor().set_element_type(ELEMENTS[precision])
        if channels_last:
            end.tensor().set_layout(openvino.Layout("NHWC"))
            end.model().set_layout(openvino.Layout("NCHW"))
    return steps.build()


def contender(
    problem: ImageProblem,
    source: bytes,
    precision: str,
    note: str = "",
    channels_last: bool = True,  # which convolutions take without a copy
) -> Contender:
    program = compiled(_model(source, precision, channels_last), problem.threads, precision)
    x = problem.data.x.permute(0, 2, 3, 1) if channels_last else problem.data.x
    y = empty(program.output(0).shape, precision)

    def bound() -> Callable[[], object]:
        request = program.create_infer_request()
        request.set_input_tensor(0, from_torch(x, precision))
        request.set_output_tensor(0, y)
        return request.infer

    calls = [bound() for _ in range(problem.copies)]

    def errors() -> Errors:
        calls[0]()
        result = to_torch(y, precision)
        result = result.permute(0, 3, 1, 2) if channels_last else result
        return Errors.of([result], [problem.data.exact])

    return Contender(calls, errors, note)
