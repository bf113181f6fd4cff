"""The figures of convolutions and of the networks made of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from cells import cell, mean, medians, table
from conv_results import (
    FORWARD,
    FORWARD_BACKWARD,
    FROZEN,
    INT8,
    INT8_PEERS,
    KINDS,
    PEERS,
    TORCH,
    TRANSPOSED,
    TRANSPOSED_FORWARD_BACKWARD,
    VISION_PEERS,
    kind,
)
from results import OURS, Result

EXACT = f"{OURS}_exact"
_OTHERS = [name for name in PEERS if name not in TORCH]
_PRECISIONS = ("fp32", "bf16", "int8")
_PROVIDERS = {
    FORWARD: (OURS, EXACT, *PEERS),
    INT8: (OURS, f"{OURS}_bytes", "torch_channels_last", *INT8_PEERS),
    FORWARD_BACKWARD: (OURS, f"{OURS}_contiguous", *TORCH),
    TRANSPOSED: (OURS, *TORCH, "torch_compile", "onnxruntime", "openvino"),
    TRANSPOSED_FORWARD_BACKWARD: (OURS, *TORCH),
}
_NETWORKS = {"resnet50": "ResNet-50", "mobilenetv2": "MobileNetV2"}


def convolutions(results: list[Result]) -> list[str]:
    """One line per kind of layer and precision: geometric means over the shapes."""
    rows = []
    for work, group in _works(results):
        streaming = any(r.level for r in group)
        limit = "bandwidth_fraction" if streaming else "peak_fraction"
        others = INT8_PEERS if group[0].op == INT8 else _OTHERS
        rows.append(
            [
                work,
                cell(mean(r.number(OURS, limit) for r in group), ".0%")
                + (" of the bandwidth" if streaming else ""),
                cell(mean(r.speedup(TORCH) for r in group), ".2f", "×"),
                cell(mean(r.speedup(others) for r in group), ".2f", "×"),
                cell(mean(r.speedup(others, ours=EXACT) for r in group), ".2f", "×"),
            ]
        )
    if not rows:
        return []
    last = "over the best other peer"
    header = ["work", "of the peak", "over torch", last, f"{last}, without Winograd"]
    return table(header, rows)


def _works(results: list[Result]) -> Iterator[tuple[str, list[Result]]]:
    """Those that ours were measured in."""
    ours = [r for r in results if OURS in r.rows]

    def where(op: str, belongs: Callable[[Result], bool]) -> list[Result]:
        return [r for r in ours if r.op == op and belongs(r)]

    found = {
        f"`{op}` {precision}, {k}": where(
            op, lambda r, p=precision, k=k: (r.precision, kind(r)) == (p, k)
        )
        for op in (FORWARD, INT8)
        for precision in _PRECISIONS
        for k in KINDS
    }
    for name, batch in (("3×3", 8), ("LeNet's layers", 64)):
        work = f"`{FORWARD}`, forward + backward, {name}, batch {batch}"
        found[work] = where(FORWARD_BACKWARD, lambda r, batch=batch: r.size("B") == batch)
    for precision in _PRECISIONS:
        for op, words in ((TRANSPOSED, ""), (TRANSPOSED_FORWARD_BACKWARD, ", forward + backward")):
            work = f"`{TRANSPOSED}` {precision}{words}"
            found[work] = where(op, lambda r, precision=precision: r.precision == precision)
    return ((work, group) for work, group in found.items() if group)


def networks(results: list[Result]) -> list[str]:
    """One line per model, batch and precision: ours beside the fastest peer in that precision."""
    rows = []
    for model, name in _NETWORKS.items():
        group = [r for r in results if r.op == "vision" and r.has(model)]
        for r in sorted(group, key=lambda r: r.size("B") or 0):
            for precision, peers in VISION_PEERS.items():
                frozen, best = f"{FROZEN}_{precision}", r.best(peers)
                ours = frozen if frozen in r.rows else f"{OURS}_{precision}"
                if ours not in r.rows or best is None:
                    continue
                rows.append(
                    [
                        f"{name} {precision}{', frozen' if ours == frozen else ''}",
                        str(r.size("B")),
                        cell(_milliseconds(r, ours), ".2f"),
                        cell(r.speedup(("torch_eager",), ours=ours), ".2f", "×"),
                        f"{best} {cell(_milliseconds(r, best), '.2f')}",
                        cell(r.speedup(peers, ours=ours), ".2f", "×"),
                        cell(r.number(ours, "agreement"), ".1%"),
                    ]
                )
    if not rows:
        return []
    header = ["224×224, random weights", "batch", "ms", "over eager fp32", "best peer, ms"]
    return table([*header, "over it", "top-1 as eager's"], rows)


def _milliseconds(r: Result, provider: str) -> float | None:
    seconds = r.seconds(provider)
    return None if seconds is None else seconds * 1e3


def by_shape(results: list[Result]) -> list[str]:
    """Every group in microseconds."""
    lines: list[str] = []
    for op, providers in _PROVIDERS.items():
        for precision in _PRECISIONS:
            group = [r for r in results if (r.op, r.precision) == (op, precision)]
            if not group:
                continue
            group.sort(key=lambda r: (_order(r), [r.size(name) or 0 for name in "BCNH"]))
            lines += ["", f"### `{op}` {precision}, median µs a call", ""]
            lines += medians(group, providers)
    models = sorted((r for r in results if r.op == "vision"), key=lambda r: r.words)
    if models:
        names = dict.fromkeys(name for r in models for name in sorted(r.rows))
        lines += ["", "### `vision`, median µs a call", "", *medians(models, list(names))]
    return lines


def _order(r: Result) -> int:
    return KINDS.index(kind(r)) if r.op in (FORWARD, INT8) else 0
