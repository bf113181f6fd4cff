"""Shapes, layouts and reference results that the tests of convolution share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pybigmodel import ops
from pybigmodel.reference import conv as reference
from pybigmodel.testing import assert_no_worse, measure_error

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DIRECT, DIRECT_ROWS, WINOGRAD2, WINOGRAD4, DEPTHWISE, PLANES = range(1, 7)
NAMES = ["auto", "direct", "direct_rows", "winograd2", "winograd4", "depthwise", "planes"]
CONV = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
OURS = {1: ops.conv1d, 2: ops.conv2d, 3: ops.conv3d}
CONV_TRANSPOSE = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
ACTIVATIONS = [
    *("none", "relu", "gelu", "gelu_tanh", "silu", "relu6", "hardswish", "leaky_relu"),
]


@dataclass(frozen=True)
class Geometry:
    """Of a convolution; what is not given is 1 an axis, or 0 for padding (before, after)."""

    batch: int
    channels: tuple[int, int]  # in, out
    size: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...] = ()
    padding: tuple[tuple[int, int], ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    output_padding: tuple[int, ...] = ()  # of a transposed one

    @property
    def axes(self) -> int:
        return len(self.size)

    @property
    def options(self) -> dict[str, Any]:
        """Those of the reference and of the wrappers."""
        ones = (1,) * self.axes
        return {
            "stride": self.stride or ones,
            "padding": self.padding or ((0, 0),) * self.axes,
            "dilation": self.dilation or ones,
            "groups": self.groups,
        }

    @property
    def raw(self) -> tuple[list[int], list[int], list[int], int]:
        """Those of the ops: stride, padding, dilation, groups."""
        o = self.options
        padding = [side for pair in o["padding"] for side in pair]
        return list(o["stride"]), padding, list(o["dilation"]), self.groups

    @property
    def weight_shape(self) -> tuple[int, ...]:
        c, n = self.channels
        return (n, c // self.groups, *self.kernel)

    def algorithms(self, bf16: bool) -> list[int]:
        """Those that compute it, by their definitions."""
        o, (c, n) = self.options, self.channels
        found = [DIRECT]
        if self.groups == 1 and o["dilation"][-1] == 1:
            found.append(DIRECT_ROWS)
        plane = (*o["stride"][-2:], *o["dilation"][-2:])
        flat_image = self.axes < 3 or (
            self.size[0] == self.kernel[0] == 1 and o["padding"][0] == (0, 0)
        )
        flat = flat_image and self.axes > 1
        if flat and not bf16 and self.kernel[-2:] == (3, 3) and plane == (1, 1, 1, 1):
            found += [WINOGRAD2, WINOGRAD4]
        if self.groups == c == n:
            found.append(DEPTHWISE)
        # Its images, in fp32 with what is around them, have to fit a cache; here all do.
        short = c * prod(self.kernel) <= 400
        if flat_image and not bf16 and self.groups == 1 and o["stride"][-1] == 1 and short:
            found.append(PLANES)
        return found

    def __str__(self) -> str:
        x = "x".join
        words = [f"n{self.batch}", "c{}-{}".format(*self.channels), x(map(str, self.size))]
        words.append("k" + x(map(str, self.kernel)))
        words += ["s" + x(map(str, self.stride))] * bool(self.stride)
        words += ["p" + x(f"{a}.{b}" for a, b in self.padding)] * bool(self.padding)
        words += ["d" + x(map(str, self.dilation))] * bool(self.dilation)
        words += [f"g{self.groups}"] * (self.groups > 1)
        words += ["o" + x(map(str, self.output_padding))] * bool(self.output_padding)
        return "-".join(words)


def same(*kernel: int) -> tuple[tuple[int, int], ...]:
    return tuple(((k - 1) // 2, k // 2) for k in kernel)


# Ones, primes, and both sides of what kernels cut at: panels of 16 channels in groups of 3 and 4,
# lanes of 1 and 2, tiles of 6 and 8 pixels, strips of 8, Winograd's tiles of 2 and 4, sums of 256.
GEOMETRIES = [
    Geometry(1, (1, 1), (1, 1), (1, 1)),
    Geometry(2, (3, 5), (1, 1), (3, 3), padding=same(3, 3)),  # one tap sees the image
    Geometry(2, (20, 33), (5, 9), (1, 1)),
    Geometry(1, (33, 20), (7, 5), (1, 1), stride=(2, 2)),
    Geometry(2, (16, 16), (6, 7), (1, 1), padding=((1, 0), (0, 2))),
    Geometry(2, (16, 32), (8, 8), (3, 3), padding=same(3, 3)),
    Geometry(2, (17, 15), (9, 11), (3, 3)),
    Geometry(1, (64, 50), (13, 6), (3, 3), padding=((0, 3), (2, 0))),
    Geometry(1, (300, 20), (5, 4), (3, 3), padding=same(3, 3)),  # more than 256 terms a tap
    Geometry(1, (10, 70), (4, 17), (3, 3), stride=(2, 1), padding=same(3, 3)),
    Geometry(2, (3, 20), (15, 17), (7, 7), stride=(2, 2), padding=((3, 3), (3, 3))),
    Geometry(3, (1, 6), (12, 10), (5, 5)),
    Geometry(2, (6, 16), (9, 8), (5, 5), padding=same(5, 5)),
    Geometry(2, (5, 7), (9, 11), (2, 3), stride=(4, 5)),  # pixels that no tap sees
    Geometry(2, (8, 20), (9, 12), (3, 3), dilation=(2, 3), padding=((2, 2), (3, 3))),
    Geometry(1, (4, 18), (6, 10), (4, 4), padding=same(4, 4)),  # 'same' of an even kernel
    Geometry(1, (5, 3), (2, 3), (5, 7), padding=((4, 5), (6, 3))),  # larger than the image
    Geometry(1, (4, 5), (3, 3), (2, 2), padding=((3, 4), (2, 5))),  # outputs that see nothing
    Geometry(2, (24, 20), (7, 6), (3, 3), padding=same(3, 3), groups=2),
    Geometry(1, (21, 9), (6, 5), (3, 2), stride=(1, 2), dilation=(2, 1), groups=3),
    Geometry(2, (20, 20), (8, 19), (3, 3), padding=same(3, 3), groups=20),
    Geometry(1, (33, 33), (11, 9), (5, 5), stride=(2, 2), padding=same(5, 5), groups=33),
    Geometry(1, (16, 16), (9, 9), (3, 3), dilation=(2, 2), padding=((3, 1), (0, 4)), groups=16),
    Geometry(2, (12, 24), (5, 6), (3, 3), padding=same(3, 3), groups=12),  # two filters a channel
    Geometry(2, (20, 18), (23,), (5,), stride=(2,), padding=((2, 3),)),
    Geometry(2, (19, 19), (30,), (4,), dilation=(3,), padding=((0, 9),), groups=19),
    Geometry(2, (3, 20), (40,), (9,), padding=same(9)),
    Geometry(4, (12, 20), (50,), (2,), padding=same(2)),  # one tap, whose last run leaves the image
    Geometry(2, (5, 18), (1500,), (3,), padding=same(3)),  # rows in pieces
    Geometry(1, (6, 17), (4, 5, 6), (3, 2, 3), padding=((1, 1), (0, 1), (2, 0))),
    Geometry(1, (4, 4), (5, 4, 9), (3, 3, 3), stride=(2, 1, 2), padding=same(3, 3, 3), groups=4),
    Geometry(1, (5, 6), (4, 6, 7), (2, 3, 2), dilation=(2, 1, 2), stride=(1, 2, 1)),
    Geometry(
        2, (17, 20), (1, 7, 9), (1, 3, 3), padding=((0, 0), (1, 1), (1, 1))
    ),  # Winograd in 3-d
]

# Of which the threads get several parts each.
THREADED = [
    Geometry(1, (300, 70), (7, 7), (3, 3), padding=same(3, 3)),
    Geometry(2, (16, 40), (33, 31), (3, 3), padding=same(3, 3)),
    Geometry(9, (40, 20), (3, 3), (3, 3), padding=same(3, 3)),  # rows narrower than a tile
    Geometry(1, (3, 40), (35, 37), (7, 7), stride=(2, 2), padding=((3, 3), (3, 3))),
    Geometry(2, (70, 70), (19, 21), (3, 3), padding=same(3, 3), groups=70),
    Geometry(1, (32, 320), (40,), (5,), padding=same(5)),
    Geometry(2, (64, 96), (20, 20), (1, 1)),
    Geometry(2, (6, 16), (40, 41), (5, 5)),
]


@dataclass
class Case:
    """Inputs of one convolution; several, where one has too few outputs for its error to mean
    much."""

    geometry: Geometry
    inputs: list[Tensor]
    weight: Tensor
    bias: Tensor | None = None
    _cache: dict[Any, Tensor] = field(default_factory=dict)

    def each(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([f(x).flatten() for x in self.inputs])

    def run(self, algorithm: int, precision: int = 0, channels_last: bool = False) -> Tensor:
        return self.each(lambda x: conv(self, x, algorithm, precision, channels_last))

    def theirs(self, dtype: torch.dtype) -> Tensor:
        """torch's, of tensors rounded to the dtype."""
        if dtype not in self._cache:
            w, b = self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype)
            self._cache[dtype] = self.each(lambda x: torch_conv(self.geometry, x.to(dtype), w, b))
        return self._cache[dtype]

    def exact(self, rounded: torch.dtype | None = None) -> Tensor:
        key = ("exact", rounded)
        if key not in self._cache:
            w = self.weight if rounded is None else self.weight.to(rounded)
            b = None if self.bias is None else self.bias.double()
            self._cache[key] = self.each(
                lambda x: reference.conv(
                    (x if rounded is None else x.to(rounded)).double(),
                    w.double(),
                    b,
                    **self.geometry.options,
                )
            )
        return self._cache[key]


@cache
def make_case(geometry: Geometry, dtype: torch.dtype, bias: bool = False) -> Case:
    """The same tensors at every call, whose results torch computes once."""
    terms = prod(geometry.weight_shape[1:])
    weight = (torch.randn(geometry.weight_shape) / terms**0.5).to(dtype)
    shape = (geometry.batch, geometry.channels[0], *geometry.size)
    outputs = geometry.channels[1] * geometry.batch
    inputs = [torch.randn(shape).to(dtype) for _ in range(min(64, -(-256 // outputs)))]
    return Case(geometry, inputs, weight, torch.randn(geometry.channels[1]) if bias else None)


def conv(
    case: Case, x: Tensor, algorithm: int, precision: int = 0, channels_last: bool = False
) -> Tensor:
    op = torch.ops.pybigmodel.conv
    arguments = (*case.geometry.raw, precision, algorithm, channels_last)
    y: Tensor = op(x, case.weight, case.bias, *arguments)
    return y


def torch_conv(geometry: Geometry, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    """torch's functions take as much padding on either side."""
    stride, padding, dilation, groups = geometry.raw
    pairs = list(zip(padding[::2], padding[1::2], strict=True))
    x = F.pad(x, [side for pair in reversed(pairs) for side in pair])
    return CONV[geometry.axes](x, w, b, stride, 0, dilation, groups)


def check_products(case: Case, algorithm: int, precision: int, actual: Tensor) -> None:
    """The policy; where bf16 is asked of wider tensors, also that the accumulators are fp32."""
    dtype = case.weight.dtype
    if precision == 0 or dtype == torch.bfloat16 or algorithm == DEPTHWISE:
        assert_no_worse(actual, case.theirs(dtype), case.exact())
        return
    assert_no_worse(actual, case.theirs(torch.bfloat16).to(dtype), case.exact())
    error = measure_error(actual, case.exact(torch.bfloat16))
    assert error.frobenius <= max(1e-6, torch.finfo(dtype).eps / 2)


def kernel_of(geometry: Geometry, algorithm: int, bf16: bool, isa: str) -> str:
    """What _native.last_kernel says of a contiguous image after a call."""
    if algorithm == DEPTHWISE:
        return f"conv_depthwise.{isa}"
    if algorithm == PLANES:
        return f"conv_planes.{isa}"
    if algorithm in (WINOGRAD2, WINOGRAD4):
        return f"conv_{NAMES[algorithm]}_f32.{isa}"
    return f"conv_direct_{'bf16' if bf16 else 'f32'}.{isa}"


def channels_last(x: Tensor) -> Tensor:
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


def image_layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values as ``x`` (N, C, spatial…) in memory as it can be found; NaN around them."""
    yield "contiguous", x.contiguous()
    yield "channels last", channels_last(x)
    yield (
        "reversed",
        x.permute(*range(x.dim() - 1, -1, -1)).contiguous().permute(*range(x.dim() - 1, -1, -1)),
    )
    yield "batch inside", x.movedim(0, -1).contiguous().movedim(-1, 0)
    wide = poison((*x.shape[:-1], 2 * x.shape[-1] + 3), x)
    wide[..., 1 : 1 + x.shape[-1]] = x
    yield "columns of a wider one", wide[..., 1 : 1 + x.shape[-1]]
    wide[..., ::2][..., : x.shape[-1]] = x
    yield "every second column", wide[..., ::2][..., : x.shape[-1]]
    for name, place in (("some channels", slice(3, 3 + x.shape[1])), ("the first", slice(0, None))):
        many = channels_last(poison((x.shape[0], x.shape[1] + place.start + 2, *x.shape[2:]), x))
        many[:, place][:, : x.shape[1]] = x
        yield f"{name} of more, channels last", many[:, place][:, : x.shape[1]]
    rows = channels_last(poison((x.shape[0], x.shape[1], *(2 * s for s in x.shape[2:])), x))
    every = (..., *(slice(None, None, 2) for _ in x.shape[2:]))
    rows[every] = x
    yield "every second pixel, channels last", rows[every]
    store = poison((x.numel() + 3,), x)
    store[3:] = x.flatten()
    yield "3 elements off", store[3:].view(x.shape)


def poison(shape: tuple[int, ...], like: Tensor) -> Tensor:
    """What lies between the elements of a view."""
    return torch.full(shape, torch.nan, dtype=like.dtype)


def winograd_bound(algorithm: int) -> float:
    """Of the error, in units of max|x|·Σ|w|, as conv2d's docstring states it."""
    return {WINOGRAD2: 1e-6, WINOGRAD4: 4e-5}[algorithm]


# Relative Frobenius errors of normally distributed tensors, as docs/numerics.md has them.
WINOGRAD_RELATIVE = {WINOGRAD2: 8e-7, WINOGRAD4: 4e-6}
