"""Draws docs/img/*.svg from benchmarks/results: rooflines, bars per shape, attention,
convolutions, MiniLM.

Usage: python benchmarks/plot.py [--results FOLDER] [--out docs/img] [--threads 2]
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
import plot_attention
import plot_conv
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from record import RESULTS
from results import DYNAMIC_PEERS, ITEMSIZE, OURS, Result, load

STYLE = {
    "svg.hashsalt": "pybigmodel",  # the same figures give the same file
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
}

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    OURS: "#d55e00",
    "torch_eager": "#999999",
    "onednn_prepacked": "#0072b2",
    "torch_compile": "#56b4e9",
    "onnxruntime": "#009e73",
    "openvino": "#cc79a7",
    "torch_quantize_dynamic": "#f0e442",
    "torchao_dynamic": "#56b4e9",
    "torchao_dynamic_compiled": "#0072b2",
    "onnxruntime_dynamic": "#009e73",
    "openvino_static": "#cc79a7",
}
PANELS = {
    ("linear", "fp32"): [OURS, "torch_eager", "onednn_prepacked", "onnxruntime", "openvino"],
    ("linear", "bf16"): [OURS, "torch_eager", "onednn_prepacked", "openvino"],
    ("int8_linear", "int8"): [OURS, *DYNAMIC_PEERS, "openvino_static"],
}
MINILM = {
    "torch_eager": "#999999",
    "torch_compile": "#56b4e9",
    "pybigmodel_fp32": "#f5b78a",
    "pybigmodel_bf16": "#e88a45",
    "pybigmodel_int8": "#d55e00",
}


def _intensity(r: Result, precision: str) -> float:
    """Operations per byte that must move: the weight, x and y once each."""
    activation = 2 if precision == "bf16" else 4
    moved = r.k * r.n * ITEMSIZE[precision] + activation * r.m * (r.k + r.n)
    return 2.0 * r.m * r.k * r.n / moved


def _median_of(results: Sequence[Result], column: str, level: str | None = None) -> float | None:
    values = [
        value
        for r in results
        if level is None or r.level == level
        if (value := r.number(OURS, column)) is not None
    ]
    return statistics.median(values) if values else None


def _roofline_panel(axes: Axes, results: list[Result], precision: str, names: list[str]) -> None:
    peak = _median_of(results, "peak_gflops")
    if peak is None:
        return
    x = np.geomspace(0.3, 2000, 200)
    for level, style in (("L2", ":"), ("L3", "--"), ("DRAM", "-")):
        if (bandwidth := _median_of(results, "level_gbps", level)) is not None:
            label = f"{level} {bandwidth:.0f} GB/s"
            axes.plot(x, np.minimum(x * bandwidth, peak), style, color="black", lw=0.8, label=label)
    for name in names:
        points = [
            (_intensity(r, precision), y)
            for r in results
            if (y := r.number(name, "gflops")) is not None
        ]
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, color=COLOURS[name], label=name)
    axes.set(xscale="log", yscale="log", xlabel="operations per byte")
    axes.set_title(f"{precision}: peak {peak:.0f} GOP/s")
    axes.set_ylim(bottom=5)
    axes.legend(fontsize=6, loc="lower right")


def rooflines(results: list[Result]) -> Figure:
    figure, axes = plt.subplots(1, len(PANELS), figsize=(12, 4), layout="constrained")
    for panel, ((op, precision), names) in zip(axes, PANELS.items(), strict=True):
        picked = [r for r in results if r.op == op and r.precision == precision]
        _roofline_panel(panel, picked, precision, names)
    axes[0].set_ylabel("GOP/s")
    return figure


def bars(results: list[Result], op: str, precision: str, names: list[str]) -> Figure:
    """One panel per M; the height is the fraction of the limit: peak, or bandwidth at M = 1."""
    picked = [r for r in results if r.op == op and r.precision == precision]
    ms = sorted({r.m for r in picked})
    figure, axes = plt.subplots(
        len(ms), 1, figsize=(9, 1.9 * len(ms)), layout="constrained", squeeze=False
    )
    for panel, m in zip(axes[:, 0], ms, strict=True):
        column = "bandwidth_fraction" if m == 1 else "peak_fraction"
        group = sorted((r for r in picked if r.m == m), key=lambda r: (r.k * r.n, r.k, r.level))
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            heights = [r.number(name, column) or 0.0 for r in group]
            at = np.arange(len(group)) + i * width
            panel.bar(at, heights, width, color=COLOURS[name], label=name)
        labels = [f"{r.k}×{r.n} {r.level}" for r in group]
        panel.set_xticks(np.arange(len(group)) + 0.4 - width / 2, labels)
        panel.axhline(1, color="black", lw=0.6)
        panel.set_ylabel(f"M = {m}\nof the " + ("bandwidth" if m == 1 else "peak"))
    axes[0, 0].legend(ncols=len(names), fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1))
    figure.suptitle(f"{op} {precision}, fraction of what the hardware gives", y=1.02)
    return figure


def minilm(results: list[Result]) -> Figure:
    picked = sorted((r for r in results if r.op == "minilm"), key=lambda r: r.m)
    figure, axes = plt.subplots(figsize=(6, 3), layout="constrained")
    width = 0.8 / len(MINILM)
    for i, (name, colour) in enumerate(MINILM.items()):
        heights = [r.m / s if (s := r.seconds(name)) else 0.0 for r in picked]
        at = np.arange(len(picked)) + i * width
        container = axes.bar(at, heights, width, color=colour, label=name)
        axes.bar_label(container, fmt="%.0f", fontsize=7)
    axes.set_xticks(np.arange(len(picked)) + 0.4 - width / 2, [f"batch {r.m}" for r in picked])
    axes.set_ylabel("sentences of 128 tokens a second")
    axes.legend(fontsize=7)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    repository = Path(__file__).parent.parent
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--out", type=Path, default=repository / "docs" / "img")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    results = [r for r in load(options.results) if r.threads == options.threads]
    matplotlib.rcParams.update(STYLE)
    figures: dict[str, Figure] = {}
    ops = {(r.op, r.precision) for r in results}
    if ops & set(PANELS):
        figures["roofline"] = rooflines(results)
    for (op, precision), names in PANELS.items():
        if (op, precision) in ops:
            figures[f"{op}_{precision}"] = bars(results, op, precision, names)
    if any(op == "minilm" for op, _ in ops):
        figures["minilm"] = minilm(results)
    for precision in plot_attention.precisions(results):
        figures[f"attention_{precision}"] = plot_attention.over_length(results, precision)
    figures |= plot_conv.figures(results)
    if not figures:
        parser.error(f"no rows for {options.threads} threads in {options.results}")
    options.out.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        path = options.out / f"{name}.svg"
        figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")
        print(path)


if __name__ == "__main__":
    main()
