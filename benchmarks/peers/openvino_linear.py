"""OpenVINO: fp32, bf16 (in and out as well), static int8, int8 weights only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openvino
import torch
from shapes import Product

from peers import Contender, onnx_models
from peers.openvino_request import ELEMENTS, compiled, core, empty, from_torch, to_torch


def _contender(
    problem: Product, source: bytes, precision: str = "fp32", note: str = ""
) -> Contender:
    x = from_torch(problem.data.x, precision)
    y = empty([problem.m, problem.n], precision)

    def bound() -> Callable[[], Any]:
        model = core().read_model(source, b"")
        if precision == "bf16":  # the plugin then computes on the tensors as they are
            steps = openvino.preprocess.PrePostProcessor(model)
            steps.input().tensor().set_element_type(ELEMENTS[precision])
            steps.output().tensor().set_element_type(ELEMENTS[precision])
            model = steps.build()
        request = compiled(model, problem.threads, precision).create_infer_request()
        request.set_input_tensor(0, x)
        request.set_output_tensor(0, y)
        return request.infer

    # A model holds its weight, so each copy has one.
    calls = [bound() for _ in range(problem.copies)]

    def result() -> torch.Tensor:
        calls[0]()
        return to_torch(y, precision)

    return Contender.of_linear(problem, calls, result, note)


def build(problem: Product) -> Contender:
    return _contender(problem, onnx_models.fp32(problem), problem.precision)


def build_static(problem: Product) -> Contender:
    note = "the activation's scale is known beforehand"
    return _contender(problem, onnx_models.static(problem), note=note)


def build_weight_only(problem: Product) -> Contender:
    return _contender(problem, onnx_models.weight_only(problem))
