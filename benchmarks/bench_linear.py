"""Inference of a linear layer with a packed weight, fp32 and bf16."""

from __future__ import annotations

from typing import Any

import pytest
from shapes import COMPUTE_M, STREAMING_M, Product, problems

PROVIDERS = [
    "pybigmodel",
    "torch_eager",
    "onednn_prepacked",
    "torch_compile",
    "onnxruntime",
    "openvino",
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", problems("linear", "fp32", STREAMING_M + COMPUTE_M), ids=str)
def test_linear_fp32(problem: Product, provider: str, measure: Any) -> None:
    measure(problem, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", problems("linear", "bf16", STREAMING_M + COMPUTE_M), ids=str)
def test_linear_bf16(problem: Product, provider: str, measure: Any) -> None:
    measure(problem, provider)
