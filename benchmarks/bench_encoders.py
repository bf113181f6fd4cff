"""MiniLM with its real weights and BERT-base, one sequence: attention and layers together."""

from __future__ import annotations

from typing import Any

import pytest
from encoders import Encoder
from peers import Contender, Unavailable

PROVIDERS = [
    "torch_eager",
    "torch_eager_bf16",
    "onnxruntime_fp32",
    "onnxruntime_int8",
    "openvino_fp32",
    "openvino_bf16",
    "openvino_int8",
    "pybigmodel_fp32",
    "pybigmodel_bf16",
    "pybigmodel_bf16_tensors",
    "pybigmodel_int8",
]
PROBLEMS = [
    Encoder("encoder", "fp32", model, s) for model in ("minilm", "bert") for s in (128, 512)
]


def build(provider: str, problem: Encoder) -> Contender:
    try:
        from peers.encoders import BUILDERS

        return BUILDERS[provider](problem)
    except ModuleNotFoundError as missing:
        raise Unavailable(f"{missing.name} is not installed") from missing


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_encoder(problem: Encoder, provider: str, measure: Any) -> None:
    measure(problem, provider, build)
