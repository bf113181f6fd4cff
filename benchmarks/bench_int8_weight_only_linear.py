"""int8 weights, floating-point activations: for few rows, bound by reading the weight."""

from __future__ import annotations

from typing import Any

import pytest
from shapes import WEIGHT_ONLY_M, Product, problems

PROVIDERS = [
    "pybigmodel",
    "torch_eager",  # fp32: what the op replaces
    "torch_int8pack",
    "torchao_weight_only",
    "openvino_weight_only",
]
PROBLEMS = problems("int8_weight_only_linear", "int8", WEIGHT_ONLY_M)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_int8_weight_only_linear(problem: Product, provider: str, measure: Any) -> None:
    measure(problem, provider)
