"""The problems of the convolution family: square images, padded so that 3×3 keeps their size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from conv_problem import ConvProblem, Shape
from conv_results import FORWARD
from problem import placed
from results import ITEMSIZE
from torch import nn

Layer = tuple[int, int, int, int, int]  # C, N, H, K, S

# ResNet-50's.
SQUARE: list[Layer] = [
    (64, 64, 56, 3, 1),
    (128, 128, 28, 3, 1),
    (256, 256, 14, 3, 1),
    (512, 512, 7, 3, 1),
]
STRIDED: list[Layer] = [(128, 128, 56, 3, 2), (256, 256, 28, 3, 2), (512, 512, 14, 3, 2)]
POINTWISE: list[Layer] = [
    (64, 256, 56, 1, 1),
    (256, 64, 56, 1, 1),
    (128, 512, 28, 1, 1),
    (512, 128, 28, 1, 1),
    (256, 1024, 14, 1, 1),
    (1024, 256, 14, 1, 1),
    (512, 2048, 7, 1, 1),
    (2048, 512, 7, 1, 1),
    (256, 512, 56, 1, 2),  # beside a block that halves the image
]
FIRST: list[Layer] = [(3, 64, 224, 7, 2), (3, 32, 224, 3, 2)]  # ResNet-50's, MobileNetV2's
# (C, H, K, S): all of MobileNetV2's, and EfficientNet-B0's of 5×5.
DEPTHWISE = [
    (32, 112, 3, 1),
    (96, 112, 3, 2),
    (144, 56, 3, 1),
    (144, 56, 3, 2),
    (192, 28, 3, 1),
    (192, 28, 3, 2),
    (384, 14, 3, 1),
    (576, 14, 3, 1),
    (576, 14, 3, 2),
    (960, 7, 3, 1),
    (144, 56, 5, 2),
    (240, 28, 5, 1),
    (672, 14, 5, 1),
    (1152, 7, 5, 1),
]


@dataclass(frozen=True)
class Convolution(ConvProblem):
    family: ClassVar[str] = "conv"
    layer: ClassVar[type[nn.Module]] = nn.Conv2d
    torch_function: ClassVar[str] = "conv2d"

    depthwise: bool = False  # each channel by itself; otherwise each output sees all of them
    valid: bool = False  # without padding

    @property
    def shape(self) -> str:
        words = [word for word in ("depthwise", "valid") if getattr(self, word)]
        return " ".join([super().shape, *words])

    @property
    def padding(self) -> int:
        return 0 if self.valid else self.k // 2

    @property
    def groups(self) -> int:
        return self.c if self.depthwise else 1

    @property
    def weight_shape(self) -> Shape:
        return self.n, self.c // self.groups, self.k, self.k

    @property
    def output_shape(self) -> Shape:
        size = (self.h + 2 * self.padding - self.k) // self.s + 1
        return self.b, self.n, size, size

    @property
    def terms(self) -> int:
        return self.weight_shape[1] * self.k**2

    @property
    def geometry(self) -> dict[str, Any]:
        return {"stride": self.s, "padding": self.padding, "groups": self.groups}

    @property
    def streamed_bytes(self) -> int | None:
        """All that a depthwise convolution reads and writes."""
        if not self.depthwise:
            return None
        shapes = (self.input_shape, self.weight_shape, self.output_shape)
        return sum(torch.Size(s).numel() for s in shapes) * ITEMSIZE[self.precision]

    @property
    def copied_bytes(self) -> int:
        """The input: every call's output lies where the last one's did."""
        return torch.Size(self.input_shape).numel() * ITEMSIZE[self.precision]

    @property
    def quick(self) -> bool:
        smallest = (*SQUARE[0][:3], 3), (3, 32, 224, 3), (192, 192, 28, 3), (1, 6, 28, 5)
        return self.b in (1, 64) and (self.c, self.n, self.h, self.k) in smallest and self.s <= 2


def problems(
    precision: str, layers: Iterable[Layer], batches: tuple[int, ...] = (1, 8), op: str = FORWARD
) -> list[Convolution]:
    return [Convolution(op, precision, b, *layer) for layer in layers for b in batches]


def depthwise(precision: str) -> list[Convolution]:
    """One image, with as many inputs in rotation as make it certain which cache holds them."""
    return [
        placed(Convolution(FORWARD, precision, 1, c, c, h, k, s, depthwise=True))
        for c, h, k, s in DEPTHWISE
    ]
