"""One new token against a cache of keys and values: bound by reading the cache."""

from __future__ import annotations

from typing import Any

import pytest
from attention_shapes import Decode
from problem import streaming_variants

PEERS = [
    "torch_eager",
    "torch_grouped",
    "onnxruntime_gqa",
    "openvino_grouped",
    "openvino_stateful",
]


def _problems(precision: str) -> list[Decode]:
    found = []
    for b in (1, 8):
        for keys in (2048, 8192):
            found += streaming_variants(Decode("attention_decode", precision, b, 32, 8, keys, 128))
    return found


@pytest.mark.parametrize("provider", ["pybigmodel", *PEERS])
@pytest.mark.parametrize("problem", _problems("fp32"), ids=str)
def test_attention_decode_fp32(problem: Decode, provider: str, measure: Any) -> None:
    measure(problem, provider)


@pytest.mark.parametrize("provider", ["pybigmodel", "pybigmodel_int8", *PEERS])
@pytest.mark.parametrize("problem", _problems("bf16"), ids=str)
def test_attention_decode_bf16(problem: Decode, provider: str, measure: Any) -> None:
    measure(problem, provider)
