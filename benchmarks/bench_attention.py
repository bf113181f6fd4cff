"""Attention, forward: full and causal, the batches of encoders, a sliding window."""

from __future__ import annotations

from typing import Any

import pytest
from attention_shapes import FORWARD, HEADS, Attention

PEERS = ["torch_eager", "onnxruntime_attention", "onnxruntime_mha", "onnxruntime_gqa", "openvino"]
PRECISIONS = ("fp32", "bf16")


def _problems(causal: bool) -> list[Attention]:
    return [
        Attention(FORWARD, precision, 1, heads, s, d, causal)
        for precision in PRECISIONS
        for d, heads in HEADS.items()
        for s in (512, 1024, 2048)
    ]


# BERT-base on 8 sequences.
ENCODERS = [Attention(FORWARD, precision, 8, 12, 128, 64) for precision in PRECISIONS]
WINDOWS = [
    Attention(FORWARD, precision, 1, heads, 4096, d, causal=True, window=256)
    for precision in PRECISIONS
    for d, heads in HEADS.items()
]


@pytest.mark.parametrize("provider", ["pybigmodel", *PEERS])
@pytest.mark.parametrize("problem", [*_problems(causal=False), *ENCODERS], ids=str)
def test_attention(problem: Attention, provider: str, measure: Any) -> None:
    measure(problem, provider)


@pytest.mark.parametrize("provider", ["pybigmodel", "pybigmodel_full", *PEERS])
@pytest.mark.parametrize("problem", _problems(causal=True), ids=str)
def test_attention_causal(problem: Attention, provider: str, measure: Any) -> None:
    measure(problem, provider)


@pytest.mark.parametrize(
    "provider",
    ["pybigmodel", "pybigmodel_causal", "torch_eager", "torch_flex", "onnxruntime_gqa", "openvino"],
)
@pytest.mark.parametrize("problem", WINDOWS, ids=str)
def test_attention_window(problem: Attention, provider: str, measure: Any) -> None:
    measure(problem, provider)
