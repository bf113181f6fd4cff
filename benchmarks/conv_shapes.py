"""The problems of the convolution family: square images, padded so that 3×3 keeps their size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

import torch
from conv_results import FORWARD, FORWARD_BACKWARD
from problem import MAX_COPIES, Problem
from results import ITEMSIZE
from torch import Tensor
from torch.nn.functional import conv2d

from pybigmodel.testing.roofline import Level, level_of

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
class Convolution(Problem):
    """x of (B, C, H, H) to N channels by K×K at stride S; `copies` are of x."""

    family: ClassVar[str] = "conv"

    b: int
    c: int
    n: int
    h: int
    k: int
    s: int = 1
    depthwise: bool = False  # each channel by itself; otherwise each output sees all of them
    valid: bool = False  # without padding

    @property
    def shape(self) -> str:
        words = [f"{name}{getattr(self, name.lower())}" for name in "BCNHKS"]
        words += [word for word in ("depthwise", "valid") if getattr(self, word)]
        return " ".join(words)

    @property
    def padding(self) -> int:
        return 0 if self.valid else self.k // 2

    @property
    def groups(self) -> int:
        return self.c if self.depthwise else 1

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        return self.b, self.c, self.h, self.h

    @property
    def weight_shape(self) -> tuple[int, int, int, int]:
        return self.n, self.c // self.groups, self.k, self.k

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        size = (self.h + 2 * self.padding - self.k) // self.s + 1
        return self.b, self.n, size, size

    @property
    def geometry(self) -> dict[str, Any]:
        """What torch's functions take beside the tensors."""
        return {"stride": self.s, "padding": self.padding, "groups": self.groups}

    @property
    def is_image(self) -> bool:
        """Whether x is the model's input, which wants no gradient."""
        return self.c <= 3

    @property
    def operations(self) -> float:
        """Of the direct algorithm, so that Winograd's may exceed the peak."""
        b, n, h, w = self.output_shape
        forward = 2.0 * b * n * h * w * self.weight_shape[1] * self.k**2
        if self.op != FORWARD_BACKWARD:
            return forward
        return forward * (2 if self.is_image else 3)

    @property
    def streamed_bytes(self) -> int | None:
        """All that a depthwise convolution reads and writes."""
        if not self.depthwise:
            return None
        shapes = (self.input_shape, self.weight_shape, self.output_shape)
        return sum(torch.Size(s).numel() for s in shapes) * ITEMSIZE[self.precision]

    @property
    def level(self) -> Level | None:
        """Of the inputs in rotation with the one output: every call's lies where the last one's
        did."""
        if self.streamed_bytes is None:
            return None
        more = (self.copies - 1) * torch.Size(self.input_shape).numel() * ITEMSIZE[self.precision]
        return level_of((self.streamed_bytes + more) // self.threads, self.threads)

    @property
    def quick(self) -> bool:
        smallest = (*SQUARE[0][:3], 3), (3, 32, 224, 3), (192, 192, 28, 3), (1, 6, 28, 5)
        return self.b in (1, 64) and (self.c, self.n, self.h, self.k) in smallest and self.s <= 2

    @cached_property
    def data(self) -> ConvData:
        return ConvData(self)


class ConvData:
    """Standard normal x, bias and output gradient, weights of variance 1 / (their sum's length)."""

    def __init__(self, problem: Convolution) -> None:
        self._problem = problem
        _, c, k, _ = problem.weight_shape
        generator = torch.Generator().manual_seed(hash((problem.input_shape, problem.weight_shape)))
        self.x = torch.randn(problem.input_shape, generator=generator)
        self.weight = torch.randn(problem.weight_shape, generator=generator) * (c * k * k) ** -0.5
        self.bias = torch.randn(problem.n, generator=generator)
        self.grad = torch.randn(problem.output_shape, generator=generator)

    @cached_property
    def exact(self) -> Tensor:
        """The result in float64."""
        x, weight, bias = (t.double() for t in (self.x, self.weight, self.bias))
        return conv2d(x, weight, bias, **self._problem.geometry)

    @cached_property
    def exact_gradients(self) -> list[Tensor]:
        """In float64, of weight and bias, and of x before them where it wants one."""
        tensors = [t.double().requires_grad_() for t in (self.x, self.weight, self.bias)]
        with torch.enable_grad():
            y = conv2d(*tensors, **self._problem.geometry)
        wanted = tensors[1:] if self._problem.is_image else tensors
        return list(torch.autograd.grad(y, wanted, self.grad.double()))


def problems(
    precision: str, layers: Iterable[Layer], batches: tuple[int, ...] = (1, 8), op: str = FORWARD
) -> list[Convolution]:
    return [Convolution(op, precision, b, *layer) for layer in layers for b in batches]


def depthwise(precision: str) -> list[Convolution]:
    """One image, with as many inputs in rotation as make it certain which cache holds them."""
    found = []
    for c, h, k, s in DEPTHWISE:
        problem = Convolution(FORWARD, precision, 1, c, c, h, k, s, depthwise=True)
        variants = (replace(problem, copies=n) for n in range(1, MAX_COPIES + 1))
        found.append(next(p for p in variants if p.level is not None))
    return found
