"""Convolutions: inference with a packed weight, in fp32, bf16 and int8, and training."""

from __future__ import annotations

from typing import Any

import pytest
from conv_results import FORWARD_BACKWARD, INT8
from conv_shapes import (
    FIRST,
    POINTWISE,
    SQUARE,
    STRIDED,
    Convolution,
    depthwise,
    problems,
)

PROVIDERS = [
    "pybigmodel",
    "pybigmodel_exact",
    "torch_eager",
    "torch_channels_last",
    "onednn_prepacked",
    "torch_compile",
    "onnxruntime",
    "openvino",
]
INT8_PROVIDERS = [
    *("pybigmodel", "pybigmodel_bytes", "torch_channels_last", "onnxruntime_static"),
    "openvino_static",
]
TRAINING_PROVIDERS = [
    "pybigmodel",
    "pybigmodel_contiguous",
    "torch_eager",
    "torch_channels_last",
]
# A layer of ResNet-50, and LeNet's two; the first of them reads an image.
TRAINING = [
    Convolution(FORWARD_BACKWARD, "fp32", 8, 64, 64, 56, 3),
    Convolution(FORWARD_BACKWARD, "fp32", 64, 1, 6, 28, 5),
    Convolution(FORWARD_BACKWARD, "fp32", 64, 6, 16, 14, 5, valid=True),
]


def _forward(precision: str) -> list[Convolution]:
    layers = [*SQUARE, *POINTWISE, *FIRST, *STRIDED]
    return [*problems(precision, layers), *depthwise(precision)]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", _forward("fp32"), ids=str)
def test_conv2d_fp32(problem: Convolution, provider: str, measure: Any) -> None:
    measure(problem, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", _forward("bf16"), ids=str)
def test_conv2d_bf16(problem: Convolution, provider: str, measure: Any) -> None:
    measure(problem, provider)


@pytest.mark.parametrize("provider", INT8_PROVIDERS)
@pytest.mark.parametrize("problem", problems("int8", [*SQUARE, *POINTWISE], op=INT8), ids=str)
def test_int8_conv2d(problem: Convolution, provider: str, measure: Any) -> None:
    measure(problem, provider)


@pytest.mark.parametrize("provider", TRAINING_PROVIDERS)  # nobody else trains
@pytest.mark.parametrize("problem", TRAINING, ids=str)
def test_conv2d_forward_backward(problem: Convolution, provider: str, measure: Any) -> None:
    measure(problem, provider)
