"""Attention over the length of the sequence: time, and the fraction of the peak."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from results import OURS, Result

# Okabe and Ito's palette, as in plot.py.
COLOURS = {
    OURS: "#d55e00",
    "torch_eager": "#999999",
    "onnxruntime_attention": "#009e73",
    "onnxruntime_mha": "#56b4e9",
    "onnxruntime_gqa": "#0072b2",
    "openvino": "#cc79a7",
}
OP = "attention"


def precisions(results: Sequence[Result]) -> list[str]:
    """Those of which there is something to draw, fp32 first."""
    return sorted({r.precision for r in results if _by_length(r)}, reverse=True)


def over_length(results: Sequence[Result], precision: str) -> Figure:
    """A column for each head dimension, full and causal; above the time, below of the peak."""
    picked = [r for r in results if _by_length(r) and r.precision == precision]
    kinds = sorted({(r.size("D") or 0, r.has("causal")) for r in picked})
    figure, axes = plt.subplots(
        2, len(kinds), figsize=(3 * len(kinds), 5), layout="constrained", squeeze=False, sharex=True
    )
    for (time, fraction), kind in zip(axes.T, kinds, strict=True):
        group = [r for r in picked if (r.size("D") or 0, r.has("causal")) == kind]
        group.sort(key=_length)
        _draw(time, group, "median_us", 1e-3)
        _draw(fraction, group, "peak_fraction", 1.0)
        time.set(yscale="log", title=f"D = {kind[0]}, {'causal' if kind[1] else 'full'}")
        fraction.set(ylim=(0, 1), xlabel="S")
    axes[0, 0].set_ylabel("ms")
    axes[1, 0].set_ylabel("of the peak")
    axes[0, 0].legend(fontsize=6)
    figure.suptitle(f"attention {precision}, forward, one sequence")
    return figure


def _by_length(r: Result) -> bool:
    return r.op == OP and r.size("B") == 1 and r.size("window") is None


def _length(r: Result) -> int:
    return r.size("S") or 0


def _draw(axes: Axes, group: Sequence[Result], column: str, scale: float) -> None:
    for name, colour in COLOURS.items():
        points = [(_length(r), y * scale) for r in group if (y := r.number(name, column))]
        if points:
            axes.plot(*zip(*points, strict=True), "o-", ms=3, lw=1, color=colour, label=name)
    lengths = [_length(r) for r in group]
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [str(s) for s in lengths])
    axes.minorticks_off()
