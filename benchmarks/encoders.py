"""Encoders whole: the models, what goes in, and what a call of one computes."""

from __future__ import annotations

import copy
import pydoc_data.topics
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, ClassVar

import torch
from peers import Errors, Unavailable
from problem import Problem
from torch import Tensor, nn

from pybigmodel import _demo
from pybigmodel._console import CommandError


@cache
def minilm() -> tuple[_demo.Embedder, Any]:
    """all-MiniLM-L6-v2 with its real weights, and its tokenizer."""
    try:
        return _demo.load()
    except CommandError as missing:
        raise Unavailable(str(missing)) from missing


def prose(batch: int, tokens: int) -> _demo.Batch:
    """Real prose long enough to fill every row: the Python language reference."""
    enough = 2000 * tokens // 128  # characters
    text = [t for _, t in sorted(pydoc_data.topics.topics.items()) if len(t) > enough]
    fields = minilm()[1](
        text[:batch], max_length=tokens, truncation=True, padding="max_length", return_tensors="pt"
    )
    return fields["input_ids"], fields["attention_mask"]


def operations(model: nn.Module, batch: int, tokens: int) -> float:
    """Linear layers and the two attention products."""
    rows = batch * tokens
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    linear = sum(2.0 * rows * m.in_features * m.out_features for m in linears)
    config = model.get_submodule("encoder").config
    return linear + config.num_hidden_layers * 4.0 * rows * tokens * config.hidden_size


class States(nn.Module):
    """Token ids and mask to the last layer's states."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        states: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return states


@cache
def bert_base() -> nn.Module:
    """BERT-base as its configuration makes it; the speed does not depend on the weights."""
    minilm()  # transformers, set up so that it neither fetches nor draws
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    return BertModel(BertConfig(), add_pooling_layer=False).eval().requires_grad_(False)


@dataclass(frozen=True)
class Encoder(Problem):
    """One sequence of `s` tokens through a model; each provider has its own precision."""

    family: ClassVar[str] = "encoder"

    model: str  # "minilm" or "bert"
    s: int

    @property
    def shape(self) -> str:
        return f"{self.model} B1 S{self.s}"

    @property
    def operations(self) -> float:
        return operations(self.data.original, 1, self.s)

    @property
    def quick(self) -> bool:
        return (self.model, self.s) == ("minilm", 128)

    @cached_property
    def data(self) -> EncoderData:
        return EncoderData(self)


class EncoderData:
    def __init__(self, problem: Encoder) -> None:
        if problem.model == "minilm":
            self.original = States(minilm()[0].encoder)
            self.inputs = prose(1, problem.s)
        else:
            self.original = States(bert_base())
            generator = torch.Generator().manual_seed(problem.s)
            ids = torch.randint(1000, 30000, (1, problem.s), generator=generator)
            self.inputs = ids, torch.ones_like(ids)
        self.original.eval()

    def with_attention(self, implementation: str) -> States:
        """A copy of the model with another of transformers' attentions."""
        model = copy.deepcopy(self.original)
        model.encoder.set_attn_implementation(implementation)
        return model

    @cached_property
    def exact(self) -> Tensor:
        states: Tensor = copy.deepcopy(self.original).double()(*self.inputs)
        return states

    @cached_property
    def eager(self) -> Tensor:
        states: Tensor = self.original(*self.inputs)
        return states

    def errors(self, states: Tensor) -> Errors:
        """The cosine is the mean over tokens."""
        states = states.double()
        found = Errors.of([states], [self.exact])
        cosine = nn.functional.cosine_similarity(states, self.eager.double(), dim=-1)
        return Errors(found.relative, found.largest, float(cosine.mean()))
