"""The problems of the linear family: y = x·Wᵀ + b with x (M, K) and W (N, K)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import torch
from problem import Problem, streaming_variants
from results import ITEMSIZE

# (K, N): the four products of a BERT-base block and one layer of a 7B model.
LAYERS = [(768, 768), (768, 3072), (3072, 768), (4096, 4096)]
STREAMING_M = (1, 8)  # bound by reading the weight
WEIGHT_ONLY_M = (1, 2, 4, 8, 16)
COMPUTE_M = (128, 512, 1024)
STREAMING_OPS = ("linear", "int8_linear", "int8_weight_only_linear")
STREAMING_LIMIT_M = 16


@dataclass(frozen=True)
class Product(Problem):
    """A matrix product; `copies` are of the weight."""

    family: ClassVar[str] = "linear"

    m: int
    k: int
    n: int

    @property
    def shape(self) -> str:
        return f"K{self.k} N{self.n} M{self.m}"

    @property
    def mnk(self) -> tuple[int, int, int]:
        return self.m, self.n, self.k

    @property
    def operations(self) -> float:
        return 2.0 * self.m * self.n * self.k

    @property
    def streamed_bytes(self) -> int | None:
        """The weight, where it is read once for little arithmetic."""
        if self.op not in STREAMING_OPS or self.m > STREAMING_LIMIT_M:
            return None
        return self.n * self.k * ITEMSIZE[self.precision]

    @property
    def quick(self) -> bool:
        if self.op in ("linear_call", "minilm"):
            return self.m == 1 and self.threads == 2
        smallest = (self.k, self.n) == LAYERS[0] and self.m in (1, 128)
        return smallest and self.threads == 2 and self.copies <= 2

    @cached_property
    def data(self) -> Data:
        return Data(self)


class Data:
    """Inputs of a problem: standard normal x and b, W with variance 1/K, the same in every run."""

    def __init__(self, problem: Product) -> None:
        generator = torch.Generator().manual_seed(hash((problem.m, problem.k, problem.n)))
        self.x = torch.randn(problem.m, problem.k, generator=generator)
        self.weight = torch.randn(problem.n, problem.k, generator=generator) * problem.k**-0.5
        self.bias = torch.randn(problem.n, generator=generator)

    @cached_property
    def exact(self) -> torch.Tensor:
        """The result in float64."""
        return torch.nn.functional.linear(self.x.double(), self.weight.double(), self.bias.double())


def problems(
    op: str, precision: str, ms: tuple[int, ...], threads: tuple[int, ...] = (2, 1)
) -> list[Product]:
    """Every layer × M × threads; streaming sizes in each cache level that can be had.

    One thread leaves out the largest products: they take most of the time and say nothing that the
    smaller ones do not.
    """
    found = []
    for t in threads:
        for k, n in LAYERS:
            for m in ms:
                problem = Product(op, precision, m, k, n, threads=t)
                if t == 1 and problem.operations > 4.5e9:
                    continue
                found += streaming_variants(problem)
    return found
