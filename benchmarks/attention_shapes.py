"""The problems of the attention family."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar

import torch
from problem import Problem
from results import ITEMSIZE
from torch import Tensor

FORWARD, FORWARD_BACKWARD = "attention", "attention_forward_backward"
# A backward pass recomputes QKᵀ and has four products beside it, to the forward pass's two.
BACKWARD_OVER_FORWARD = 2.5

HEADS = {64: 12, 128: 8}  # by head dimension: BERT-base's, a Llama-like


def visible(rows: int, keys: int, causal: bool, window: int | None) -> Tensor | None:
    """Which keys each query sees, as (rows, keys) bool; None: all."""
    if not causal and window is None:
        return None
    mask = torch.ones(rows, keys, dtype=torch.bool).tril(keys - rows)
    return mask if window is None else mask.triu(keys - rows - window + 1)


@dataclass(frozen=True)
class Attention(Problem):
    """q, k, v of (B, H, S, D). A window is the number of latest keys that a query sees, its own
    included."""

    family: ClassVar[str] = "attention"

    b: int
    heads: int
    s: int
    d: int
    causal: bool = False
    window: int | None = None

    @property
    def shape(self) -> str:
        words = [f"B{self.b}", f"H{self.heads}", f"S{self.s}", f"D{self.d}"]
        if self.causal:
            words.append("causal")
        if self.window is not None:
            words.append(f"window{self.window}")
        return " ".join(words)

    @property
    def pairs(self) -> int:
        """Of a query and a key that it sees."""
        if self.window is not None:
            return sum(min(i + 1, self.window) for i in range(self.s))
        return self.s * (self.s + 1) // 2 if self.causal else self.s * self.s

    @property
    def small(self) -> Attention:
        return replace(self, s=32)

    @property
    def operations(self) -> float:
        """Of QKᵀ and PV over visible pairs; the softmax is not counted."""
        forward = 4.0 * self.b * self.heads * self.pairs * self.d
        return forward * (1 + BACKWARD_OVER_FORWARD) if self.op == FORWARD_BACKWARD else forward

    @property
    def quick(self) -> bool:
        return self.d == 64 and self.operations < 6e9

    @cached_property
    def data(self) -> AttentionData:
        shape = (self.b, self.heads, self.s, self.d)
        return AttentionData(shape, shape, visible(self.s, self.s, self.causal, self.window))


@dataclass(frozen=True)
class Decode(Problem):
    """One new query per sequence against the `keys` tokens of its cache, its own token included.

    `copies` are of the cache: each layer of a model has one of its own.
    """

    family: ClassVar[str] = "attention_decode"

    b: int
    heads: int
    kv_heads: int
    keys: int
    d: int

    @property
    def shape(self) -> str:
        return f"B{self.b} H{self.heads} Hkv{self.kv_heads} S{self.keys} D{self.d}"

    @property
    def operations(self) -> float:
        return 4.0 * self.b * self.heads * self.keys * self.d

    @property
    def streamed_bytes(self) -> int:
        """The cache, both halves."""
        return 2 * self.b * self.kv_heads * self.keys * self.d * ITEMSIZE[self.precision]

    @property
    def int8_bytes(self) -> int:
        """The cache in int8 with one float32 scale for each token and head."""
        return 2 * self.b * self.kv_heads * self.keys * (self.d + 4)

    @property
    def quick(self) -> bool:
        return (self.b, self.keys, self.level) == (1, 2048, "L3")

    @cached_property
    def data(self) -> AttentionData:
        query = (self.b, self.heads, 1, self.d)
        return AttentionData(query, (self.b, self.kv_heads, self.keys, self.d))


@dataclass(frozen=True)
class Additive(Problem):
    """query, key and value of (B, S, H), v of (H,): score = vᵀ·tanh(query + key)."""

    family: ClassVar[str] = "additive_attention"

    b: int
    s: int
    h: int

    @property
    def shape(self) -> str:
        return f"B{self.b} S{self.s} H{self.h}"

    @property
    def small(self) -> Additive:
        return replace(self, s=32)

    @property
    def operations(self) -> float:
        """An addition, a tanh (as one) and a multiply-add per score's term; two for the value's."""
        forward = 6.0 * self.b * self.s * self.s * self.h
        return forward * (1 + BACKWARD_OVER_FORWARD) if "backward" in self.op else forward

    @property
    def quick(self) -> bool:
        return (self.b, self.s) == (1, 512)

    @cached_property
    def data(self) -> AdditiveData:
        return AdditiveData(self)


class AttentionData:
    """Standard normal q, k, v, the same in every run, and the exact result."""

    def __init__(
        self, query: tuple[int, ...], cache: tuple[int, ...], mask: Tensor | None = None
    ) -> None:
        generator = torch.Generator().manual_seed(hash((query, cache)))
        self.q = torch.randn(query, generator=generator)
        self.k = torch.randn(cache, generator=generator)
        self.v = torch.randn(cache, generator=generator)
        self.mask = mask

    @property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.k, self.v

    @cached_property
    def exact(self) -> Tensor:
        """The result in float64, head by head: all scores at once would take gigabytes."""
        out = torch.empty(*self.q.shape[:-1], self.v.shape[-1], dtype=torch.float64)
        for row, (q, k, v) in zip(out.flatten(0, 1), self._heads(), strict=True):
            row.copy_(_attend(q.double(), k.double(), v.double(), self.mask))
        return out

    @cached_property
    def grad(self) -> Tensor:
        """Of the output, where a backward pass is measured."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.q.shape, generator=generator)

    @cached_property
    def exact_gradients(self) -> list[Tensor]:
        """Of q, k and v in float64, which have as many heads each."""
        found = []
        for grad, heads in zip(self.grad.flatten(0, 1), self._heads(), strict=True):
            leaves = [t.double().requires_grad_() for t in heads]
            with torch.enable_grad():
                out = _attend(*leaves, self.mask)
            found.append(torch.autograd.grad(out, leaves, grad.double()))
        return [
            torch.stack(gradients).view(t.shape)
            for t, gradients in zip(self.qkv, zip(*found, strict=True), strict=True)
        ]

    def _heads(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        group = self.q.shape[1] // self.k.shape[1]
        for q, k, v in zip(*self.qkv, strict=True):
            for h in range(len(q)):
                yield q[h], k[h // group], v[h // group]


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    scores = q @ k.T / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(-1) @ v


def additive_attention(query: Tensor, key: Tensor, value: Tensor, v: Tensor) -> Tensor:
    """What a model composes from torch's ops; its (B, Sq, Sk, H) tensors are the price."""
    scores = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ v
    return scores.softmax(-1) @ value


class AdditiveData:
    """Standard normal inputs, v with variance 1/H, and the exact results."""

    def __init__(self, problem: Additive) -> None:
        b, s, h = problem.b, problem.s, problem.h
        generator = torch.Generator().manual_seed(hash((b, s, h)))
        query, key, value = (torch.randn(b, s, h, generator=generator) for _ in range(3))
        self.inputs = (query, key, value, torch.randn(h, generator=generator) * h**-0.5)
        self.grad = torch.randn(b, s, h, generator=generator)

    @cached_property
    def exact(self) -> Tensor:
        *rows, v = (t.double() for t in self.inputs)
        return torch.cat([additive_attention(*one, v) for one in _by_sequence(rows)])

    @cached_property
    def exact_gradients(self) -> list[Tensor]:
        """In float64, sequence by sequence; v's is their sum."""
        *rows, v = (t.double() for t in self.inputs)
        found = []
        for *one, grad in _by_sequence([*rows, self.grad.double()]):
            leaves = [t.clone().requires_grad_() for t in (*one, v)]
            with torch.enable_grad():
                out = additive_attention(*leaves)
            found.append(torch.autograd.grad(out, leaves, grad))
        *of_rows, of_v = zip(*found, strict=True)
        return [*map(torch.cat, of_rows), torch.stack(of_v).sum(0)]


def _by_sequence(tensors: list[Tensor]) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(t.split(1) for t in tensors), strict=True)
