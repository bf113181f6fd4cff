"""Tables in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from results import Result, geometric_mean


def mean(values: Iterable[float | None]) -> float | None:
    """Geometric, of those that were measured."""
    present = [v for v in values if v is not None]
    return geometric_mean(present) if present else None


def cell(value: float | None, form: str, suffix: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{suffix}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def medians(results: Iterable[Result], providers: Sequence[str]) -> list[str]:
    """A line a group, the microseconds of every provider that was measured in one of them."""
    groups = list(results)
    kept = [name for name in providers if any(name in r.rows for r in groups)]
    rows = [[r.shape, *(cell(r.number(name, "median_us"), ".4g") for name in kept)] for r in groups]
    return table(["shape", *kept], rows)
