"""What is measured: a problem is one group of rows, and says how much work one call of it is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar, TypeVar

from pybigmodel.testing.roofline import Level, cache_sizes, level_of

# More copies of the same data than this in a rotation would measure the start-up of runtimes.
MAX_COPIES = 32


@dataclass(frozen=True)
class Problem:
    """Everything in it is measured in the same interleaved run."""

    family: ClassVar[str]  # which peers there are

    op: str
    precision: str  # of the products: "fp32", "bf16", "int8"
    threads: int = field(default=2, kw_only=True)
    copies: int = field(default=1, kw_only=True)  # of what a call streams, called in rotation
    isa: str | None = field(default=None, kw_only=True)  # forced tier; None: the CPU's best

    @property
    def shape(self) -> str:
        """Sizes and options in words of letters and digits, as "B1 H12 S512 D64 causal"."""
        raise NotImplementedError

    @property
    def mnk(self) -> tuple[int, int, int] | None:
        """The sizes of the matrix product, where the problem is one."""
        return None

    @property
    def operations(self) -> float:
        """Multiplications and additions of one call."""
        raise NotImplementedError

    @property
    def quick(self) -> bool:
        """Belongs to the smoke test."""
        raise NotImplementedError

    @property
    def small(self) -> Problem:
        """The same work in small, where memory is recorded: it sets up all but the memory."""
        raise NotImplementedError

    @property
    def streamed_bytes(self) -> int | None:
        """What a call must read and does little with, so that reading bounds it; None: it is bound
        by arithmetic."""
        return None

    @property
    def copied_bytes(self) -> int:
        """What each copy has of its own of the streamed bytes."""
        return self.streamed_bytes or 0

    @property
    def level(self) -> Level | None:
        """Where what is streamed lies between two uses of the same copy."""
        if self.streamed_bytes is None:
            return None
        rotating = self.streamed_bytes + (self.copies - 1) * self.copied_bytes
        return level_of(rotating // self.threads, self.threads)

    def __str__(self) -> str:
        parts = [self.op, self.precision, *self.shape.split(), f"t{self.threads}"]
        if self.level:
            parts.append(self.level)
        if self.isa:
            parts.append(self.isa)
        return "-".join(parts)


P = TypeVar("P", bound=Problem)


def copies_for(
    size: int, threads: int, wanted: Callable[[Level | None], bool], most: int = MAX_COPIES
) -> int | None:
    """The fewest copies of `size` bytes whose rotation lies in a level that is wanted."""
    for copies in range(1, most + 1):
        if wanted(level_of(size * copies // threads, threads)):
            return copies
    return None


def streaming_variants(problem: P) -> list[P]:
    """The problem with what it streams in the nearest cache level that can be named, and in DRAM.

    Data of ambiguous size is rotated with as many copies as make the level certain. DRAM is left
    out where that would take more than MAX_COPIES copies. A problem bound by arithmetic is itself.
    """
    size, threads = problem.streamed_bytes, problem.threads
    if size is None:
        return [problem]
    nearest = copies_for(size, threads, lambda level: level is not None)
    if nearest is None:
        raise ValueError(f"{problem}: no number of copies up to {MAX_COPIES} gives a cache level")
    variants = [replace(problem, copies=nearest)]
    sizes = cache_sizes()
    in_dram = -(-4 * max(sizes.l3, sizes.l2 * threads) // size)
    if in_dram <= MAX_COPIES and variants[0].level != "DRAM":
        variants.append(replace(problem, copies=in_dram))
    return variants


def placed(problem: P) -> P:
    """With as few copies in rotation as make it certain which level holds what is streamed."""
    for copies in range(1, MAX_COPIES + 1):
        if (variant := replace(problem, copies=copies)).level is not None:
            return variant
    raise ValueError(f"{problem}: no number of copies up to {MAX_COPIES} gives a cache level")
