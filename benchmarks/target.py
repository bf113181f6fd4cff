"""What a speed target is, and the words that lists of them are written in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from results import OURS, Result

Value = Callable[[Result], float | None]
Filter = Callable[[Result], bool]


@dataclass(frozen=True)
class Target:
    """`value` of every group that `where` picks must reach `aim` (stay below, if at_most)."""

    work: str
    text: str
    aim: float
    where: Filter
    value: Value
    by_mean: bool = False  # judged by the geometric mean; otherwise by the worst group
    at_most: bool = False
    digits: int = 2

    def holds(self, value: float) -> bool:
        return value <= self.aim if self.at_most else value >= self.aim


def ratio(*peers: str, ours: str = OURS) -> Value:
    """Time of the fastest of `peers` over our time."""
    return lambda r: r.speedup(peers, ours)


def time_over(*peers: str, ours: str = OURS) -> Value:
    """Our time over that of the fastest of `peers`."""

    def value(r: Result) -> float | None:
        speedup = r.speedup(peers, ours)
        return None if speedup is None else 1 / speedup

    return value


def column(name: str, provider: str = OURS) -> Value:
    return lambda r: r.number(provider, name)
