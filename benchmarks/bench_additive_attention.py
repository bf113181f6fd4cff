"""Additive attention, which torch composes from tensors of (B, S, S, H); memory is recorded too."""

from __future__ import annotations

from typing import Any

import pytest
from attention_shapes import Additive

PROVIDERS = ["pybigmodel", "torch_eager", "torch_compile"]
PROBLEMS = [
    Additive(op, "fp32", b, s, 256)
    for op in ("additive_attention", "additive_attention_forward_backward")
    for b, s in ((1, 512), (8, 512), (1, 1024))  # another S: memory must not grow with its square
]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_additive_attention(problem: Additive, provider: str, measure: Any) -> None:
    measure(problem, provider)
