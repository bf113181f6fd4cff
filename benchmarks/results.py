"""Reads benchmarks/results/*.csv back, group by group, and does the sums that reports share."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from record import RESULTS, read

OURS = "pybigmodel"
ITEMSIZE = {"fp32": 4, "bf16": 2, "int8": 1}  # bytes of an element
DYNAMIC_PEERS = (
    "torch_quantize_dynamic",
    "torchao_dynamic",
    "torchao_dynamic_compiled",
    "onnxruntime_dynamic",
)
PER_TENSOR_PEERS = ("torch_quantize_dynamic", "onnxruntime_dynamic")


@dataclass
class Result:
    """The rows of one group by provider: one problem, one interleaved run, one machine."""

    name: str
    op: str
    precision: str  # the group's; a row may have another
    m: int | None  # m, k, n: of products
    k: int | None
    n: int | None
    words: str  # sizes and options of what is not a product
    threads: int
    level: str
    isa: str
    rows: dict[str, dict[str, str]] = field(default_factory=dict)

    def number(self, provider: str, column: str) -> float | None:
        """The value, or None where the provider or the value is missing."""
        text = self.rows.get(provider, {}).get(column, "")
        return float(text) if text else None

    def seconds(self, provider: str) -> float | None:
        microseconds = self.number(provider, "median_us")
        return None if microseconds is None else microseconds * 1e-6

    def best(self, providers: Iterable[str]) -> str | None:
        """The fastest of the providers that were measured."""
        times = {p: t for p in providers if (t := self.seconds(p)) is not None}
        return min(times, key=times.__getitem__) if times else None

    def speedup(self, peers: Iterable[str], ours: str = OURS) -> float | None:
        """Time of the fastest of `peers` over our time."""
        own, best = self.seconds(ours), self.best(peers)
        if own is None or best is None:
            return None
        theirs = self.seconds(best)
        return None if theirs is None else theirs / own

    @property
    def shape(self) -> str:
        is_product = self.m is not None
        text = f"K={self.k} N={self.n} M={self.m}" if is_product else self.words
        return f"{text} {self.level}" if self.level else text

    def has(self, option: str) -> bool:
        return option in self.words.split()

    def size(self, name: str) -> int | None:
        """512 for "S" where the shape is "B1 H12 S512 D64"."""
        found = re.search(rf"\b{name}(\d+)\b", self.words)
        return int(found[1]) if found else None


def load(folder: Path = RESULTS, cpu: str | None = None) -> list[Result]:
    """All groups in the folder's CSV files, of one CPU: `cpu`, or the one measured last."""
    rows = [row for path in sorted(folder.glob("*.csv")) for row in read(path)]
    if not rows:
        return []
    chosen = cpu or max(rows, key=lambda row: row["date"])["cpu"]
    found: dict[str, Result] = {}
    for row in rows:
        if row["cpu"] != chosen:
            continue
        result = found.setdefault(
            row["group"],
            Result(
                row["group"],
                row["op"],
                row["group"].split("-")[1],
                *(int(row[c]) if row[c] else None for c in ("m", "k", "n")),
                row.get("shape") or "",
                int(row["threads"]),
                row["weight_level"],
                row["isa"],
            ),
        )
        result.rows[row["provider"]] = row
    return list(found.values())


def from_command_line(usage: str | None) -> tuple[list[Result], int]:
    """The results that `--results` and `--threads` choose, and that number of threads."""
    parser = argparse.ArgumentParser(description=(usage or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    results = [r for r in load(options.results) if r.threads == options.threads]
    if not results:
        parser.error(f"no rows for {options.threads} threads in {options.results}")
    return results, options.threads


def geometric_mean(values: Iterable[float]) -> float:
    logs = [math.log(v) for v in values]
    return math.exp(sum(logs) / len(logs))
