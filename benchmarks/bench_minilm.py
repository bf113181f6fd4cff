"""all-MiniLM-L6-v2 with its real weights on real sentences: what a user gets from pbm.optimize."""

from __future__ import annotations

import copy
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from encoders import minilm, operations, prose
from peers import Contender, Errors
from peers.torch_compile import freeze
from shapes import Product
from torch import nn

import pybigmodel as pbm

TOKENS, HIDDEN = 128, 384
PROVIDERS = {
    "torch_eager": "fp32",
    "torch_eager_bf16": "bf16",
    "torch_compile": "fp32",
    "pybigmodel_fp32": "fp32",
    "pybigmodel_bf16": "bf16",
    "pybigmodel_int8": "int8",
}
# m: sentences, k: tokens in each, n: width
PROBLEMS = [
    Product("minilm", "fp32", batch, TOKENS, HIDDEN, threads=threads)
    for threads in (2, 1)
    for batch in (1, 32)
]


@cache
def _references(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings in float64, and torch eager's."""
    original, inputs = minilm()[0], prose(batch, TOKENS)
    return copy.deepcopy(original).double()(*inputs), original(*inputs).double()


def build(provider: str, problem: Product) -> Contender:
    original = minilm()[0]
    inputs = prose(problem.m, TOKENS)
    precision = PROVIDERS[provider]
    if provider == "torch_compile":
        call = freeze(copy.deepcopy(original), *inputs)
    else:
        model: nn.Module = original
        if provider == "torch_eager_bf16":
            model = copy.deepcopy(original).bfloat16()
        elif provider != "torch_eager":
            model = pbm.optimize(original, precision=precision, example_inputs=inputs)

        def call() -> torch.Tensor:
            return model(*inputs)

    def errors() -> Errors:
        y = call().double()
        exact, eager = _references(problem.m)
        cosine = float(nn.functional.cosine_similarity(y, eager, dim=1).mean())
        return replace(Errors.of([y], [exact]), cosine=cosine)

    counted = operations(original, problem.m, TOKENS)
    return Contender([call], errors, precision=precision, operations=counted)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_minilm(problem: Product, provider: str, measure: Any) -> None:
    measure(problem, provider, build)
