"""Shapes, magnitudes, masks and reference results that the tests of additive attention share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from attention_cases import covering, some_hidden
from torch import Tensor

from pybigmodel import ops
from pybigmodel.reference.additive_attention import additive_attention as reference
from pybigmodel.testing import assert_no_worse, measure_error
from pybigmodel.testing.tolerance import FACTOR

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
Shape = tuple[int, int, int, int, int]

# (B, Sq, Sk, H, Dv): both sides of what kernels cut at: 3 queries, 4 and 64 rows, blocks of 64 and
# parts of 128 keys, pairs, 16 and 32 columns of hidden. At least 60 rows each: the error of a row's
# scores is common to all its outputs, and of few rows it is luck.
SHAPES: list[Shape] = [
    (64, 1, 1, 1, 1),
    (64, 1, 130, 33, 17),
    (30, 2, 64, 16, 140),
    (20, 3, 257, 40, 8),
    (16, 4, 5, 7, 3),
    (8, 9, 63, 15, 16),
    (4, 16, 65, 31, 33),
    (3, 21, 100, 32, 5),
    (2, 65, 64, 65, 64),
    (1, 130, 129, 48, 20),
    (3, 64, 300, 2, 1),
    (1, 67, 17, 130, 40),
]

MASKS: dict[str, Callable[[Shape, torch.dtype], Tensor | None]] = {
    "none": lambda s, t: None,
    "bool": lambda s, t: some_hidden(s[1], s[2]).expand(s[0], -1, -1).clone(),
    "bool rows": lambda s, t: torch.rand(s[1], 1) > 0.3,
    "padding": lambda s, t: torch.arange(s[2]) < torch.randint(1, s[2] + 1, (s[0], 1, 1)),
    "causal": lambda s, t: torch.ones(s[1], s[2], dtype=torch.bool).tril(),
    "float32": lambda s, t: torch.randn(s[0], s[1], s[2]),
    "dtype": lambda s, t: torch.randn(s[1], s[2]).to(t),
    "infinite": lambda s, t: torch.zeros(s[1], s[2], dtype=t).masked_fill(
        ~some_hidden(s[1], s[2]), -torch.inf
    ),
    "key bias": lambda s, t: torch.randn(s[2]),
    "row bias": lambda s, t: torch.randn(s[0], s[1], 1),
}

# Sizes of query and key: tanh q, tanh k; both forms side by side; e^(2q), e^(2k); tanh itself.
SIZES = [0.02, 0.35, 1.5, 9.0]
FACTORS: dict[str, list[Any]] = {
    "shape": SHAPES,
    "dtype": FLOATS,
    "mask": list(MASKS),
    "size": SIZES,
    "same_sign": [False, True],
    "dropout_p": [0.0, 0.3],
}


@dataclass
class Case:
    """Arguments of one call."""

    query: Tensor
    key: Tensor
    value: Tensor
    v: Tensor
    options: dict[str, Any] = field(default_factory=dict)

    def tensors(self) -> dict[str, Tensor]:
        """Those that are floating and may have gradients."""
        named = {"query": self.query, "key": self.key, "value": self.value, "v": self.v}
        mask = self.options.get("attn_mask")
        return named if mask is None or mask.dtype == torch.bool else {**named, "mask": mask}

    def replaced(self, **tensors: Tensor) -> Case:
        options = dict(self.options)
        if "mask" in tensors:
            options["attn_mask"] = tensors.pop("mask")
        own = {"query": self.query, "key": self.key, "value": self.value, "v": self.v}
        return Case(**{**own, **tensors}, options=options)

    def to(self, dtype: torch.dtype) -> Case:
        return self.replaced(**{n: t.to(dtype) for n, t in self.tensors().items()})

    def leaves(self, *names: str) -> tuple[Case, list[Tensor]]:
        """A copy whose tensors of these names, all if none, are leaves that require grad."""
        own = {
            name: t.detach().requires_grad_(name in names or not names)
            for name, t in self.tensors().items()
        }
        return self.replaced(**own), [t for t in own.values() if t.requires_grad]

    def call(self, f: Callable[..., Any], **more: Any) -> Any:
        return f(self.query, self.key, self.value, self.v, **self.options, **more)


def matrix(**restricted: list[Any]) -> list[dict[str, Any]]:
    return covering({**FACTORS, **restricted})


def name_of(choice: dict[str, Any]) -> str:
    words = {n: v for n, v in choice.items() if v not in (0.0, "none", False)}
    words["shape"] = "x".join(map(str, choice["shape"]))
    words["dtype"] = str(choice["dtype"])[6:]
    return " ".join(v if n in ("shape", "dtype") else f"{n}={v}" for n, v in words.items())


def make(
    shape: Shape,
    dtype: torch.dtype = torch.float32,
    mask: str = "none",
    size: float = 1.0,
    same_sign: bool = False,
    dropout_p: float = 0.0,
) -> Case:
    b, sq, sk, h, dv = shape
    query, key = (torch.randn(b, s, h) * size for s in (sq, sk))
    v = torch.rand(h) if same_sign else torch.randn(h)
    tensors = (query, key, torch.randn(b, sk, dv), v / h**0.5)
    options: dict[str, Any] = {"attn_mask": MASKS[mask](shape, dtype)}
    if dropout_p:
        options |= {"dropout_p": dropout_p, "dropout_seed": 2**40 + 11}
    return Case(*(t.to(dtype) for t in tensors), options=options)


def ours(case: Case) -> tuple[Tensor, Tensor]:
    out, lse = case.call(ops.additive_attention, return_lse=True)
    return out, lse


def exact(case: Case) -> tuple[Tensor, Tensor]:
    """Output and lse in float64 of the same rounded inputs."""
    out, lse = case.to(torch.float64).call(reference)
    return out, lse


def theirs(case: Case) -> tuple[Tensor, Tensor]:
    """What torch's ops make of it, each rounding to the tensors' own dtype."""
    out, lse = case.to(case.query.dtype).call(reference)
    return out, lse


def in_fp32(case: Case) -> tuple[Tensor, Tensor]:
    out, lse = case.to(torch.float32).call(reference)
    return out, lse


MAXIMUM_FACTOR = 3.0  # the largest of thousands of errors, beside torch's largest: luck up to this


def assert_policy(
    triples: Iterable[tuple[Tensor, Tensor, Tensor]], floor_ulps: float = 2.0
) -> None:
    """Results, torch's and exact ones, several together: the policy of docs/numerics.md."""
    got, other, expected = (
        torch.cat([t.detach().flatten() for t in ts]) for ts in zip(*triples, strict=True)
    )
    assert_no_worse(got, other, expected, factor=MAXIMUM_FACTOR, floor_ulps=floor_ulps)
    mine, theirs = (measure_error(t, expected).frobenius for t in (got, other))
    limit = max(FACTOR * theirs, floor_ulps * torch.finfo(got.dtype).eps)
    assert mine <= limit, f"Frobenius error {mine:.3g} is above {limit:.3g}; torch has {theirs:.3g}"


def sizes(stop: int, dtype: torch.dtype) -> range:
    """All from 1 on, or one in seven."""
    return range(1, stop, 1 if dtype == torch.float32 else 7)
