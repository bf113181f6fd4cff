"""Int8 convolutions and their exact results, for the tests of the op."""

from __future__ import annotations

from typing import Any

import torch
from conv_cases import Geometry
from torch import Tensor

from pybigmodel import ops
from pybigmodel.reference.int8_conv import int8_conv as expected


class Filters:
    """Int8 weights of a geometry, packed, and scales of either sign."""

    def __init__(self, geometry: Geometry) -> None:
        self.geometry, n = geometry, geometry.channels[1]
        self.q = torch.randint(-128, 128, geometry.weight_shape, dtype=torch.int8)
        self.scale = (torch.rand(n) + 0.1) / 100 * torch.randn(n).sign()
        self.packed = ops.pack_int8_conv_weight(self.q, groups=geometry.groups)

    def run(self, x: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        g = self.geometry
        arguments = (x, self.packed, self.scale, g.kernel, bias)
        return ops.int8_conv(*arguments, **g.options, **options)

    def exact(self, x: Tensor, bias: Tensor | None = None, **options: Any) -> Tensor:
        return expected(x, self.q, self.scale, bias, **self.geometry.options, **options)


def image(geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """uint8: any bytes; floating: normally distributed around 0.3."""
    shape = (geometry.batch, geometry.channels[0], *geometry.size)
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype)
    return (torch.randn(shape) + 0.3).to(dtype)


def within_rounding(actual: Tensor, exact: Tensor, ulps: float = 3) -> None:
    """Integer sums are exact, so that only the epilogue's few fp32 roundings remain, of values up
    to the largest of the result."""
    eps = torch.finfo(torch.float32).eps
    tolerance = ulps * eps * (exact.abs() + exact.abs().amax())
    if actual.dtype != torch.float32:
        kind = torch.finfo(actual.dtype)
        tolerance = tolerance + kind.eps * exact.abs() / 2 + kind.smallest_normal * kind.eps
    off = (actual.double() - exact).abs()
    worst = off.flatten()[(off - tolerance).flatten().argmax()]
    assert (off <= tolerance).all(), f"off by {worst:.3g}, of at most {exact.abs().amax():.3g}"


def same_bytes(actual: Tensor, exact: Tensor, scale: float, zero_point: int) -> None:
    """To the bit, but where the result lies within rounding of the middle between two steps."""
    assert actual.dtype == torch.uint8
    steps = exact / torch.tensor(scale, dtype=torch.float32).double()
    expected = (steps.round() + zero_point).clamp(0, 255)
    doubtful = ((steps - steps.floor() - 0.5).abs() < 1e-4 * (1 + steps.abs() / 100)).double()
    assert doubtful.mean() < 0.01
    assert ((actual.double() - expected).abs() <= doubtful).all()
