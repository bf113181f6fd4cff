"""OpenVINO, CPU plugin: fp32, bf16 (in and out as well), static int8, int8 weights only."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import openvino
import torch
from shapes import Product

from peers import Contender, onnx_models


@cache
def _core() -> openvino.Core:
    return openvino.Core()


def _compile(model: openvino.Model, threads: int, precision: str) -> openvino.CompiledModel:
    config = {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": precision,
    }
    return _core().compile_model(model, "CPU", config)


def _contender(
    problem: Product, source: bytes, precision: str = "f32", note: str = ""
) -> Contender:
    in_bf16 = precision == "bf16"
    element = openvino.Type.bf16 if in_bf16 else openvino.Type.f32
    x = openvino.Tensor(element, [problem.m, problem.k])
    y = openvino.Tensor(element, [problem.m, problem.n])
    if in_bf16:
        x.data.view(np.int16)[:] = problem.data.x.bfloat16().view(torch.int16).numpy()
    else:
        x.data[:] = problem.data.x.numpy()

    def bound() -> Callable[[], Any]:
        model = _core().read_model(source, b"")
        if in_bf16:  # the plugin then computes on the tensors as they are, without conversions
            steps = openvino.preprocess.PrePostProcessor(model)
            steps.input().tensor().set_element_type(element)
            steps.output().tensor().set_element_type(element)
            model = steps.build()
        request = _compile(model, problem.threads, precision).create_infer_request()
        request.set_input_tensor(0, x)
        request.set_output_tensor(0, y)
        return request.infer

    calls = [bound() for _ in range(problem.copies)]

    def result() -> torch.Tensor:
        calls[0]()
        if in_bf16:
            return torch.from_numpy(y.data.view(np.int16).copy()).view(torch.bfloat16)
        return torch.from_numpy(y.data.copy())

    return Contender.of_linear(problem, calls, result, note)


def build(problem: Product) -> Contender:
    precision = {"fp32": "f32", "bf16": "bf16"}[problem.precision]
    return _contender(problem, onnx_models.fp32(problem), precision)


def build_static(problem: Product) -> Contender:
    note = "the activation's scale is known beforehand"
    return _contender(problem, onnx_models.static(problem), note=note)


def build_weight_only(problem: Product) -> Contender:
    return _contender(problem, onnx_models.weight_only(problem))
