"""The problems that are measured: y = x·Wᵀ + b with x (M, K) and W (N, K)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from results import ITEMSIZE

from pybigmodel.testing.roofline import Level, cache_sizes, level_of

# (K, N): the four products of a BERT-base block and one layer of a 7B model.
LAYERS = [(768, 768), (768, 3072), (3072, 768), (4096, 4096)]
STREAMING_M = (1, 8)  # bound by reading the weight
WEIGHT_ONLY_M = (1, 2, 4, 8, 16)
COMPUTE_M = (128, 512, 1024)
# More copies of a weight than this in a rotation would measure the start-up of runtimes.
MAX_COPIES = 32
STREAMING_OPS = ("linear", "int8_linear", "int8_weight_only_linear")
STREAMING_LIMIT_M = 16


@dataclass(frozen=True)
class Problem:
    """One group of rows: everything in it is measured in the same interleaved run."""

    op: str
    precision: str  # of the products: "fp32", "bf16", "int8"
    m: int
    k: int
    n: int
    threads: int = 2
    copies: int = 1  # of the weight, called in rotation
    isa: str | None = None  # forced tier; None: the best that the CPU has

    @property
    def weight_bytes(self) -> int:
        return self.n * self.k * ITEMSIZE[self.precision]

    @property
    def weight_level(self) -> Level | None:
        """Where the weights in rotation lie between two uses of the same one."""
        return level_of(self.weight_bytes * self.copies // self.threads, self.threads)

    @property
    def streaming(self) -> bool:
        """Bound by reading the weight: it is read once for little arithmetic."""
        return self.op in STREAMING_OPS and self.m <= STREAMING_LIMIT_M

    @property
    def operations(self) -> float:
        return 2.0 * self.m * self.n * self.k

    @property
    def quick(self) -> bool:
        """Belongs to the smoke test."""
        if self.op in ("linear_call", "minilm"):
            return self.m == 1 and self.threads == 2
        smallest = (self.k, self.n) == LAYERS[0] and self.m in (1, 128)
        return smallest and self.threads == 2 and self.copies <= 2

    @cached_property
    def data(self) -> Data:
        return Data(self)

    def __str__(self) -> str:
        parts = [self.op, self.precision, f"K{self.k}", f"N{self.n}", f"M{self.m}"]
        parts += [f"t{self.threads}"]
        if self.streaming and self.weight_level:
            parts.append(self.weight_level)
        if self.isa:
            parts.append(self.isa)
        return "-".join(parts)


class Data:
    """Inputs of a problem: standard normal x and b, W with variance 1/K, the same in every run."""

    def __init__(self, problem: Problem) -> None:
        generator = torch.Generator().manual_seed(hash((problem.m, problem.k, problem.n)))
        self.x = torch.randn(problem.m, problem.k, generator=generator)
        self.weight = torch.randn(problem.n, problem.k, generator=generator) * problem.k**-0.5
        self.bias = torch.randn(problem.n, generator=generator)

    @cached_property
    def exact(self) -> torch.Tensor:
        """The result in float64."""
        return torch.nn.functional.linear(self.x.double(), self.weight.double(), self.bias.double())

    def errors(self, y: torch.Tensor | np.ndarray) -> tuple[float, float]:
        """Relative L2 error and largest absolute error over the RMS of the result."""
        if isinstance(y, np.ndarray):
            y = torch.from_numpy(y)
        difference = y.double() - self.exact
        norm = float(self.exact.norm())
        rms = norm / self.exact.numel() ** 0.5
        return float(difference.norm()) / norm, float(difference.abs().max()) / rms


def streaming_variants(problem: Problem) -> list[Problem]:
    """The problem with its weight in the nearest cache level that can be named, and in DRAM.

    A weight of ambiguous size is rotated with as many copies as make the level certain. DRAM is
    left out where that would take more than MAX_COPIES copies.
    """
    variants = []
    for copies in range(1, MAX_COPIES + 1):
        candidate = replace(problem, copies=copies)
        if candidate.weight_level is not None:
            variants.append(candidate)
            break
    if not variants:
        raise ValueError(f"{problem}: no number of copies up to {MAX_COPIES} gives a cache level")
    sizes = cache_sizes()
    footprint = 4 * max(sizes.l3, sizes.l2 * problem.threads)
    in_dram = replace(problem, copies=-(-footprint // problem.weight_bytes))
    if in_dram.copies <= MAX_COPIES and variants[0].weight_level != "DRAM":
        variants.append(in_dram)
    return variants


def problems(
    op: str, precision: str, ms: tuple[int, ...], threads: tuple[int, ...] = (2, 1)
) -> list[Problem]:
    """Every layer × M × threads; streaming sizes in each cache level that can be had.

    One thread leaves out the largest products: they take most of the time and say nothing that the
    smaller ones do not.
    """
    found = []
    for t in threads:
        for k, n in LAYERS:
            for m in ms:
                problem = Problem(op, precision, m, k, n, t)
                if t == 1 and problem.operations > 4.5e9:
                    continue
                found += streaming_variants(problem) if problem.streaming else [problem]
    return found
