"""``pybigmodel bench``: linear layers on this machine, ours against torch eager, in a minute.

The full suite, with the peers and the rows that the documentation quotes, is in the repository's
benchmarks/; this is the part that an installed package can answer by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from pybigmodel import _native, ops
from pybigmodel._console import OtherLoad, load_note, table
from pybigmodel.testing import roofline
from pybigmodel.testing.timers import interleave

LAYERS = ((768, 768), (768, 3072), (3072, 768), (4096, 4096))  # in, out features
ROWS = (1, 8, 128, 512)
QUICK_LAYERS = ((768, 3072),)
QUICK_ROWS = (1, 128)

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Comparison:
    """`ours` and `torch` do the same work; `peak` is what bounds it: a kind of roofline.peak."""

    name: str
    peak: roofline.PeakKind
    ours: Call
    torch: Call


def comparisons(rows: int, k: int, n: int) -> list[Comparison]:
    x, w = torch.randn(rows, k), torch.randn(n, k) / k**0.5
    x16, w16 = x.bfloat16(), w.bfloat16()
    packed, packed16 = ops.pack_linear_weight(w), ops.pack_linear_weight(w, "bf16")
    q, scale = ops.quantize_weight(w)
    packed8 = ops.pack_int8_linear_weight(q)
    eager, eager16 = partial(linear, x, w), partial(linear, x16, w16)
    return [
        Comparison("fp32", "fp32", partial(ops.linear_packed, x, packed, n), eager),
        Comparison("fp32, weight as it is", "fp32", partial(ops.linear, x, w), eager),
        Comparison("bf16", "bf16", partial(ops.linear_packed, x16, packed16, n), eager16),
        Comparison("int8", "int8", partial(ops.int8_linear, x, packed8, scale), eager),
        Comparison(
            "int8 weights", "int8", partial(ops.int8_weight_only_linear, x, packed8, scale), eager
        ),
    ]


def run(*, quick: bool) -> tuple[dict[str, Any], str]:
    threads = torch.get_num_threads()
    rounds, seconds = (2, 0.01) if quick else (5, 0.03)
    kinds: tuple[roofline.PeakKind, ...] = ("fp32", "bf16", "int8")
    peaks = {kind: roofline.peak(kind, threads, 2 * seconds) for kind in kinds}
    results, load = [], OtherLoad()
    with torch.no_grad():
        for k, n in QUICK_LAYERS if quick else LAYERS:
            for m in QUICK_ROWS if quick else ROWS:
                results += _measure(m, k, n, peaks, rounds, seconds)
    facts = {
        "threads": threads,
        "isa": _native.active_isa(),
        "torch": torch.__version__,
        "peak_ops_per_second": peaks,
        "cores_used_by_others": load.cores(),
        "results": results,
    }
    return facts, _render(facts)


def _measure(
    m: int, k: int, n: int, peaks: dict[roofline.PeakKind, float], rounds: int, seconds: float
) -> list[dict[str, Any]]:
    pairs = comparisons(m, k, n)
    contenders: dict[str, list[Call]] = {pair.name: [pair.ours] for pair in pairs}
    contenders |= {"torch fp32": [pairs[0].torch], "torch bf16": [pairs[2].torch]}
    timings = interleave(contenders, rounds=rounds, seconds=seconds, require_idle=False)
    found = []
    for pair in pairs:
        ours = timings[pair.name].median
        theirs = timings["torch bf16" if pair.name == "bf16" else "torch fp32"].median
        found.append(
            {
                "m": m,
                "k": k,
                "n": n,
                "op": pair.name,
                "microseconds": ours * 1e6,
                "torch_microseconds": theirs * 1e6,
                "speedup": theirs / ours,
                "peak_fraction": 2.0 * m * k * n / ours / peaks[pair.peak],
            }
        )
    return found


def _render(facts: dict[str, Any]) -> str:
    rows = [
        [
            f"{r['k']} to {r['n']}, {r['op']}",
            str(r["m"]),
            f"{r['microseconds']:.1f}",
            f"{r['torch_microseconds']:.1f}",
            f"{r['speedup']:.2f}×",
            f"{r['peak_fraction']:.0%}",
        ]
        for r in facts["results"]
    ]
    title = (
        f"linear layers, {facts['threads']} threads, {facts['isa']} kernels, torch "
        f"{facts['torch']}\nmicroseconds a call, median; torch: F.linear in bf16 for bf16, else "
        "in fp32; peak: of the arithmetic measured here\n"
    )
    header = ["layer", "rows", "ours", "torch", "speed-up", "of peak"]
    return title + table(header, rows) + load_note(facts["cores_used_by_others"])
