"""The problems of transposed convolutions: the layers by which decoders double their images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from conv_problem import ConvProblem, Shape
from torch import nn

# (C, N, H, K, S, P, OP)
LAYERS = [
    (256, 128, 28, 2, 2, 0, 0),  # U-Net's
    (128, 64, 32, 4, 2, 1, 0),  # DCGAN's, and autoencoders'
    (64, 32, 56, 3, 2, 1, 1),  # CycleGAN's
]


@dataclass(frozen=True)
class TransposedConvolution(ConvProblem):
    """P pixels are cut off on every side, OP are added at the end."""

    family: ClassVar[str] = "conv_transpose"
    layer: ClassVar[type[nn.Module]] = nn.ConvTranspose2d
    torch_function: ClassVar[str] = "conv_transpose2d"

    padding: int = 0
    output_padding: int = 0

    @property
    def shape(self) -> str:
        more = {"P": self.padding, "OP": self.output_padding}
        return " ".join([super().shape, *(f"{name}{n}" for name, n in more.items() if n)])

    @property
    def weight_shape(self) -> Shape:
        return self.c, self.n, self.k, self.k

    @property
    def output_shape(self) -> Shape:
        size = (self.h - 1) * self.s - 2 * self.padding + self.k + self.output_padding
        return self.b, self.n, size, size

    @property
    def terms(self) -> float:
        return self.c * self.k**2 / self.s**2

    @property
    def geometry(self) -> dict[str, Any]:
        return {
            "stride": self.s,
            "padding": self.padding,
            "output_padding": self.output_padding,
        }

    @property
    def quick(self) -> bool:
        return self.b == 1 and self.k == 2


def problems(op: str, precision: str) -> list[TransposedConvolution]:
    """One image, of the first layer eight too."""
    batches = [(1, 8), *[(1,)] * (len(LAYERS) - 1)]
    return [
        TransposedConvolution(op, precision, b, *layer)
        for layer, sizes in zip(LAYERS, batches, strict=True)
        for b in sizes
    ]
