"""Attention in training: the output and the gradients of q, k and v."""

from __future__ import annotations

from typing import Any

import pytest
from attention_shapes import FORWARD_BACKWARD, HEADS, Attention

PROBLEMS = [
    Attention(FORWARD_BACKWARD, precision, 1, heads, 1024, d, causal)
    for precision in ("fp32", "bf16")
    for d, heads in HEADS.items()
    for causal in (False, True)
]


@pytest.mark.parametrize("provider", ["pybigmodel", "torch_eager"])  # nobody else trains
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_attention_backward(problem: Attention, provider: str, measure: Any) -> None:
    measure(problem, provider)
