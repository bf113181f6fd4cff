"""int8 products with activations quantised in the op, per token, at every call."""

from __future__ import annotations

from typing import Any

import pytest
from shapes import COMPUTE_M, STREAMING_M, Product, problems

PROVIDERS = [
    "pybigmodel",
    "torch_eager",  # fp32: what the op replaces
    "torch_quantize_dynamic",
    "torchao_dynamic",
    "torchao_dynamic_compiled",
    "onnxruntime_dynamic",
    "openvino_static",
]
PROBLEMS = problems("int8_linear", "int8", STREAMING_M + COMPUTE_M)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_int8_linear(problem: Product, provider: str, measure: Any) -> None:
    measure(problem, provider)
