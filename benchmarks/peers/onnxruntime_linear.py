"""ONNX Runtime: fp32 and dynamic int8."""

from __future__ import annotations

import numpy as np
from onnxruntime import OrtValue
from shapes import Product

from peers import Contender, Unavailable, onnx_models
from peers.onnxruntime_session import bound, session


def _contender(problem: Product, model: bytes) -> Contender:
    x = OrtValue.ortvalue_from_numpy(problem.data.x.numpy())
    y = OrtValue.ortvalue_from_numpy(np.zeros((problem.m, problem.n), np.float32))
    # A session holds its weight, so each copy has one.
    calls = [
        bound(session(model, problem.threads), {"x": x}, {"y": y}) for _ in range(problem.copies)
    ]

    def result() -> np.ndarray:
        calls[0]()
        return np.array(y.numpy())

    return Contender.of_linear(problem, calls, result)


def build(problem: Product) -> Contender:
    if problem.precision != "fp32":
        raise Unavailable("its CPU provider has no bf16 MatMul on x86")
    return _contender(problem, onnx_models.fp32(problem))


def build_dynamic(problem: Product) -> Contender:
    return _contender(problem, onnx_models.dynamic(problem))
