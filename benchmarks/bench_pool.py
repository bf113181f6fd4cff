"""Poolings of images: maxima of floats and of bytes, means."""

from __future__ import annotations

from typing import Any

import pytest
from pool_results import OTHERS, TORCH
from pool_shapes import Pooling, problems
from results import OURS

PROVIDERS = [OURS, *TORCH, *OTHERS]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", problems("fp32"), ids=str)
def test_pool_fp32(problem: Pooling, provider: str, measure: Any) -> None:
    measure(problem, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", problems("bf16"), ids=str)
def test_pool_bf16(problem: Pooling, provider: str, measure: Any) -> None:
    measure(problem, provider)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", problems("int8"), ids=str)
def test_pool_uint8(problem: Pooling, provider: str, measure: Any) -> None:
    measure(problem, provider)
