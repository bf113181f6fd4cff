"""Each ISA tier below the best, forced: fp32 and int8 side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peers
import pytest
from peers import Contender, Unavailable
from shapes import LAYERS, Product

from pybigmodel import _native

TIERS = ("avx2", "avx512")  # `scalar` is an oracle, not a contender
# provider: the op and precision that it runs
OPS = {
    "pybigmodel_fp32": ("linear", "fp32"),
    "pybigmodel_bf16": ("linear", "bf16"),
    "pybigmodel_int8": ("int8_linear", "int8"),
}
PROBLEMS = [
    Product("tiers", "fp32", m, k, n, threads=2, isa=tier)
    for tier in TIERS
    for k, n in LAYERS
    for m in (128, 512)
]


def build(provider: str, problem: Product) -> Contender:
    if problem.isa not in _native.available_isas():
        raise Unavailable(f"this CPU has no {problem.isa}")
    op, precision = OPS[provider]
    contender = peers.build("pybigmodel", replace(problem, op=op, precision=precision))
    return replace(contender, precision=precision)


@pytest.mark.parametrize("provider", OPS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_tier(problem: Product, provider: str, measure: Any) -> None:
    measured = measure(problem, provider, build)
    assert measured.row.isa == problem.isa
