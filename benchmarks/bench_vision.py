"""ResNet-50 and MobileNetV2 whole, with random weights: convolutions and what lies between them."""

from __future__ import annotations

from typing import Any

import pytest
from peers import Contender, Unavailable
from vision import Vision

PROVIDERS = [
    "torch_eager",
    "torch_channels_last",
    "torch_eager_bf16",
    "torch_compile",
    "onnxruntime_fp32",
    "onnxruntime_int8",
    "openvino_fp32",
    "openvino_bf16",
    "openvino_int8",
    "pybigmodel_fp32",
    "pybigmodel_compile",
    "pybigmodel_bf16",
    "pybigmodel_int8",
    "pybigmodel_frozen_fp32",
    "pybigmodel_frozen_bf16",
    "pybigmodel_frozen_int8",
]
PROBLEMS = [
    Vision("vision", "fp32", "resnet50", 1),
    Vision("vision", "fp32", "resnet50", 8),
    Vision("vision", "fp32", "mobilenetv2", 1),
    Vision("vision", "fp32", "mobilenetv2tf", 1),
]


def build(provider: str, problem: Vision) -> Contender:
    try:
        from peers.vision import BUILDERS

        return BUILDERS[provider](problem)
    except ModuleNotFoundError as missing:
        raise Unavailable(f"{missing.name} is not installed") from missing


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_vision(problem: Vision, provider: str, measure: Any) -> None:
    measure(problem, provider, build)
