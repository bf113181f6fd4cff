"""all-MiniLM-L6-v2 with its real weights on real sentences: what a user gets from pbm.optimize."""

from __future__ import annotations

import copy
import pydoc_data.topics
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from peers import Contender, Errors, Unavailable
from peers.torch_compile import freeze
from shapes import Product
from torch import nn

import pybigmodel as pbm
from pybigmodel import _demo
from pybigmodel._console import CommandError

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
def _loaded() -> tuple[_demo.Embedder, Any]:
    try:
        return _demo.load()
    except CommandError as missing:
        raise Unavailable(str(missing)) from missing


def _inputs(batch: int) -> _demo.Batch:
    """Real prose long enough to fill every row: the Python language reference."""
    text = [t for _, t in sorted(pydoc_data.topics.topics.items()) if len(t) > 2000][:batch]
    fields = _loaded()[1](
        text, max_length=TOKENS, truncation=True, padding="max_length", return_tensors="pt"
    )
    return fields["input_ids"], fields["attention_mask"]


def _operations(model: nn.Module, batch: int) -> float:
    """Linear layers and the two attention products."""
    rows = batch * TOKENS
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    linear = sum(2.0 * rows * m.in_features * m.out_features for m in linears)
    layers = model.get_submodule("encoder").config.num_hidden_layers
    return linear + layers * 4.0 * rows * TOKENS * HIDDEN


@cache
def _references(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings in float64, and torch eager's."""
    original, inputs = _loaded()[0], _inputs(batch)
    return copy.deepcopy(original).double()(*inputs), original(*inputs).double()


def build(provider: str, problem: Product) -> Contender:
    original = _loaded()[0]
    inputs = _inputs(problem.m)
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

    operations = _operations(original, problem.m)
    return Contender([call], errors, precision=precision, operations=operations)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_minilm(problem: Product, provider: str, measure: Any) -> None:
    measure(problem, provider, build)
