"""Convolutions: layers beside their peers, networks whole, and which algorithm is chosen where."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from cells import mean
from conv_results import DEPTHWISE, FIRST, FORWARD, FROZEN, INT8, POINTWISE, SQUARE, STRIDED, kind
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from results import OURS, Result

from pybigmodel import ops

# Okabe and Ito's palette, as in plot.py.
COLOURS = {
    OURS: "#d55e00",
    "torch_channels_last": "#999999",
    "torch_compile": "#56b4e9",
    "onnxruntime": "#009e73",
    "onnxruntime_static": "#009e73",
    "openvino": "#cc79a7",
    "openvino_static": "#cc79a7",
}
# What the others' speed is compared with.
_REFERENCE = {"fp32": "onednn_prepacked", "bf16": "onednn_prepacked", "int8": "onnxruntime_static"}
_KINDS = (SQUARE, POINTWISE, FIRST, STRIDED, DEPTHWISE)
_NETWORKS = {"resnet50 B1": "ResNet-50", "resnet50 B8": "ResNet-50, batch 8"} | {
    "mobilenetv2 B1": "MobileNetV2"
}
_ALGORITHMS = {"direct": "#0072b2", "winograd2": "#e69f00", "winograd4": "#d55e00"}


def layers(results: Sequence[Result]) -> Figure:
    """A panel for each precision: speed by kinds of layers, geometric means over their shapes."""
    figure, axes = plt.subplots(
        1, len(_REFERENCE), figsize=(12, 3), layout="constrained", width_ratios=(5, 5, 2)
    )
    for panel, (precision, reference) in zip(axes, _REFERENCE.items(), strict=True):
        op = INT8 if precision == "int8" else FORWARD
        picked = [r for r in results if (r.op, r.precision) == (op, precision)]
        _layers_panel(panel, picked, reference)
        panel.set_title(f"{precision}, speed over {reference.replace('_', ' ')}", fontsize=9)
    axes[0].legend(fontsize=6)
    return figure


def _layers_panel(axes: Axes, results: Sequence[Result], reference: str) -> None:
    kinds = [k for k in _KINDS if any(kind(r) == k for r in results)]
    names = [name for name in COLOURS if any(name in r.rows for r in results)]
    names = [name for name in names if name != reference]
    width = 0.8 / max(len(names), 1)
    for i, name in enumerate(names):
        heights = [
            mean(r.speedup((reference,), ours=name) for r in results if kind(r) == k) or 0.0
            for k in kinds
        ]
        at = np.arange(len(kinds)) + i * width
        axes.bar(at, heights, width, color=COLOURS[name], label=name.replace("_", " "))
    axes.axhline(1, color="black", lw=0.6)
    axes.set_xticks(np.arange(len(kinds)) + 0.4 - width / 2, kinds)


def networks(results: Sequence[Result]) -> Figure:
    """A panel for each network: milliseconds, the fastest first."""
    found = {r.words: r for r in results if r.op == "vision" and r.words in _NETWORKS}
    figure, axes = plt.subplots(
        1, len(found), figsize=(12, 3.5), layout="constrained", squeeze=False
    )
    for panel, (words, r) in zip(axes[0], sorted(found.items()), strict=True):
        times = sorted((s * 1e3, name) for name in r.rows if (s := r.seconds(name)) is not None)
        colours = ["#d55e00" if name.startswith((OURS, FROZEN)) else "#999999" for _, name in times]
        at = np.arange(len(times))
        container = panel.barh(at, [ms for ms, _ in times], color=colours)
        panel.bar_label(container, fmt="%.1f", fontsize=6)
        panel.set_yticks(at, [name.replace("_", " ") for _, name in times], fontsize=6)
        panel.invert_yaxis()
        panel.set(title=_NETWORKS[words], xlabel="ms")
    return figure


def choice() -> Figure:
    """Of 3×3, stride 1, in fp32, over channels (as many in as out) and the size of the image."""
    channels = [16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024]
    sizes = [4, 5, 7, 10, 14, 20, 28, 40, 56, 80, 112, 160, 224]
    names = list(_ALGORITHMS)
    figure, axes = plt.subplots(1, 2, figsize=(8, 3.5), layout="constrained", sharey=True)
    for panel, batch in zip(axes, (1, 8), strict=True):
        grid = [[names.index(_chosen(batch, c, size)) for c in channels] for size in sizes]
        panel.imshow(
            grid, cmap=ListedColormap(list(_ALGORITHMS.values())), vmin=0, vmax=2, origin="lower"
        )
        panel.set_xticks(range(len(channels)), channels, fontsize=7)
        panel.set_yticks(range(len(sizes)), sizes, fontsize=7)
        panel.set(title=f"batch {batch}", xlabel="channels")
    axes[0].set_ylabel("height and width")
    patches = [Patch(color=colour, label=name) for name, colour in _ALGORITHMS.items()]
    figure.legend(handles=patches, loc="outside lower center", ncols=3, fontsize=8)
    return figure


def _chosen(batch: int, channels: int, size: int) -> str:
    name = ops.conv_algorithm(
        (batch, channels, size, size), (channels, channels, 3, 3), padding=1, dtype=torch.float32
    )
    return str(name)


def figures(results: Sequence[Result]) -> dict[str, Figure]:
    """Those of which there is something to draw."""
    found = {"conv_choice": choice()}
    if any(r.op in (FORWARD, INT8) for r in results):
        found["conv_layers"] = layers(results)
    if any(r.op == "vision" for r in results):
        found["networks"] = networks(results)
    return found
