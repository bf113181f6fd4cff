"""Measures convolution for docs/numerics.md: `python tests/ops/conv_error_table.py --write`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pybigmodel import ops
from pybigmodel.testing import measure_error

DOC = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"
BEGIN, END = "<!-- measured convolutions: begin -->", "<!-- measured convolutions: end -->"
ALGORITHMS = ["direct", "winograd2", "winograd4"]
Conv = Callable[[Tensor, Tensor], Tensor]


def ours(algorithm: str) -> Conv:
    return lambda x, w: ops.conv2d(x, w, padding=1, algorithm=algorithm)  # type: ignore[arg-type]


def theirs(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=1)


def images() -> Iterator[tuple[str, Tensor, Tensor]]:
    torch.manual_seed(0)
    for channels in (16, 64, 256, 512):
        x, w = torch.randn(1, channels, 28, 28), torch.randn(64, channels, 3, 3)
        yield f"{channels} channels", x, w
        if channels == 64:
            yield "the same times 1e-30", x * 1e-30, w
            yield "the same times 1e30", x * 1e30, w
            yield "the same behind ReLU", x.relu(), w
            yield "the same plus 100", x + 100, w
            yield "the same, a column of 1e4", x.index_fill(-1, torch.tensor([6]), 1e4), w


def over_layers(conv: Conv, layers: int) -> float:
    """The error at the end of so many layers of 64 channels with ReLU between them."""
    torch.manual_seed(0)
    y = torch.randn(1, 64, 28, 28)
    exact = y.double()
    for _ in range(layers):
        w = torch.randn(64, 64, 3, 3) * (2 / 576) ** 0.5
        y, exact = conv(y, w).relu(), F.conv2d(exact, w.double(), padding=1).relu()
    return measure_error(y, exact).frobenius


def table() -> str:
    lines = [
        "Relative Frobenius error against float64: 3×3 taps, 28×28 pixels, fp32, best tier:",
        "",
        "| image | torch | " + " | ".join(ALGORITHMS) + " |",
        "|---|---|" + "---|" * len(ALGORITHMS),
    ]
    contenders = [theirs, *map(ours, ALGORITHMS)]
    for what, x, w in images():
        exact = F.conv2d(x.double(), w.double(), padding=1)
        cells = [f"{measure_error(conv(x, w), exact).frobenius:.2g}" for conv in contenders]
        lines.append(f"| {what} | " + " | ".join(cells) + " |")
    for layers in (1, 4, 16, 64):
        cells = [f"{over_layers(conv, layers):.2g}" for conv in contenders]
        lines.append(f"| {layers} layers of 64 with ReLU | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the table into docs/numerics.md")
    text = table()
    if parser.parse_args().write:
        before, rest = DOC.read_text().split(BEGIN)
        DOC.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    else:
        print(text)
