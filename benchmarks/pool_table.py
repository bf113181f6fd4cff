"""The figures of poolings."""

from __future__ import annotations

from collections.abc import Iterator

from cells import cell, mean, medians, table
from pool_results import OPS, OTHERS, TORCH
from results import OURS, Result

_PRECISIONS = {"fp32": "fp32", "bf16": "bf16", "int8": "uint8"}  # as a reader knows them


def poolings(results: list[Result]) -> list[str]:
    """One line per op and precision: geometric means over the shapes."""
    rows = [
        [
            work,
            cell(mean(r.number(OURS, "bandwidth_fraction") for r in group), ".0%"),
            cell(mean(r.speedup(TORCH) for r in group), ".2f", "×"),
            cell(mean(r.speedup(OTHERS) for r in group), ".2f", "×"),
        ]
        for work, group in _works(results)
    ]
    if not rows:
        return []
    return table(["work", "of the bandwidth", "over torch", "over the best other peer"], rows)


def by_shape(results: list[Result]) -> list[str]:
    """Every group in microseconds."""
    lines: list[str] = []
    for work, group in _works(results):
        lines += ["", f"### {work}, median µs a call", ""]
        lines += medians(group, (OURS, *TORCH, *OTHERS))
    return lines


def _works(results: list[Result]) -> Iterator[tuple[str, list[Result]]]:
    for op in OPS:
        for precision, name in _PRECISIONS.items():
            group = [r for r in results if (r.op, r.precision) == (op, precision)]
            group.sort(key=lambda r: [r.size(name) or 0 for name in "KCB"])
            if group:
                yield f"`{op}` {name}", group
