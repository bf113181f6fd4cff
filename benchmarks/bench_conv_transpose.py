"""Transposed convolutions: inference, and training."""

from __future__ import annotations

from typing import Any

import pytest
from conv_results import TRANSPOSED, TRANSPOSED_FORWARD_BACKWARD
from conv_transpose_shapes import TransposedConvolution, problems

TRAINING_PROVIDERS = ["pybigmodel", "torch_eager", "torch_channels_last"]
PROVIDERS = [*TRAINING_PROVIDERS, "torch_compile", "onnxruntime", "openvino"]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", problems(TRANSPOSED, "fp32"), ids=str)
def test_conv_transpose2d_fp32(problem: TransposedConvolution, provider: str, measure: Any) -> None:
    measure(problem, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", problems(TRANSPOSED, "bf16"), ids=str)
def test_conv_transpose2d_bf16(problem: TransposedConvolution, provider: str, measure: Any) -> None:
    measure(problem, provider)


@pytest.mark.parametrize("provider", TRAINING_PROVIDERS)  # nobody else trains
@pytest.mark.parametrize("problem", problems(TRANSPOSED_FORWARD_BACKWARD, "fp32"), ids=str)
def test_conv_transpose2d_forward_backward(
    problem: TransposedConvolution, provider: str, measure: Any
) -> None:
    measure(problem, provider)
