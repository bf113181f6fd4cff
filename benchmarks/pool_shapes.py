"""The problems of the pooling family: square images, odd windows padded by half of themselves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import ClassVar

import torch
from pool_results import MAX, MEAN, WHOLE
from problem import Problem, placed
from results import ITEMSIZE
from torch import Tensor
from torch.nn import functional

# (op, C, H, K, S) and the batches
LAYERS = [
    ((MAX, 64, 112, 3, 2), (1, 8)),  # ResNet-50's
    ((MAX, 512, 20, 5, 1), (1,)),  # YOLO's SPPF
    ((MEAN, 192, 28, 3, 1), (1,)),  # Inception's
    ((MEAN, 256, 28, 2, 2), (1,)),  # DenseNet-121's
    ((WHOLE, 2048, 7, 7, 1), (1, 8)),  # ResNet-50's
]


@dataclass(frozen=True)
class Pooling(Problem):
    """Windows of K×K at stride S over x of (B, C, H, H), in int8 one of uint8; `copies` are of x.

    `WHOLE` is the mean of each channel, K being H.
    """

    family: ClassVar[str] = "pool"

    b: int
    c: int
    h: int
    k: int
    s: int

    @property
    def shape(self) -> str:
        return " ".join(f"{name}{getattr(self, name.lower())}" for name in "BCHKS")

    @property
    def padding(self) -> int:
        return 0 if self.op == WHOLE else (self.k - 1) // 2

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.b, self.c, self.h, self.h

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        size = (self.h + 2 * self.padding - self.k) // self.s + 1
        return self.b, self.c, size, size

    @property
    def function(self) -> Callable[[Tensor], Tensor]:
        """torch's."""
        function = getattr(functional, self.op)
        if self.op == WHOLE:
            return partial(function, output_size=1)
        return partial(function, kernel_size=self.k, stride=self.s, padding=self.padding)

    @property
    def operations(self) -> float:
        """A comparison or an addition for each pixel that a window covers."""
        return float(torch.Size(self.output_shape).numel() * self.k**2)

    @property
    def streamed_bytes(self) -> int:
        """All that it reads and writes."""
        pixels = sum(torch.Size(s).numel() for s in (self.input_shape, self.output_shape))
        return pixels * ITEMSIZE[self.precision]

    @property
    def copied_bytes(self) -> int:
        """The input: every call's output lies where the last one's did."""
        return torch.Size(self.input_shape).numel() * ITEMSIZE[self.precision]

    @property
    def quick(self) -> bool:
        return self.b == 1 and self.c in (64, 256, 2048)

    @cached_property
    def data(self) -> PoolData:
        return PoolData(self)


class PoolData:
    """Standard normal x, or uniform bytes."""

    def __init__(self, problem: Pooling) -> None:
        self._problem = problem
        shape = problem.input_shape
        generator = torch.Generator().manual_seed(hash(shape))
        if problem.precision == "int8":
            self.x = torch.randint(256, shape, generator=generator, dtype=torch.uint8)
        else:
            self.x = torch.randn(shape, generator=generator)

    @cached_property
    def exact(self) -> Tensor:
        """The result in float64."""
        return self._problem.function(self.x.double())


def problems(precision: str) -> list[Pooling]:
    """With as many inputs in rotation as make it certain which cache holds them."""
    return [
        placed(Pooling(op, precision, b, *sizes))
        for (op, *sizes), batches in LAYERS
        for b in batches
        if op == MAX or precision != "int8"
    ]
