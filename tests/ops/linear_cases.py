"""Shapes, layouts and reference results that the tests of the linear ops share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from pybigmodel import ops

FLOATS = [torch.float32, torch.bfloat16, torch.float16]

# (rows, out_features, in_features): ones, primes, and both sides of what kernels cut at: tiles of
# 3, 4, 6 and 8 rows; panels of 16 columns in groups of 3 and 4; lanes of 1, 2 and 4 values of k,
# blocks of 256 and 512 terms, panels of 4,096 lanes, chunks of 384 rows.
SHAPES = [
    (1, 1, 1),
    (1, 16, 2),
    (2, 3, 5),
    (3, 17, 7),
    (4, 15, 16),
    (5, 64, 17),
    (6, 16, 15),
    (7, 47, 63),
    (8, 48, 64),
    (9, 49, 65),
    (13, 65, 255),
    (15, 63, 256),
    (16, 31, 257),
    (17, 1, 48),
    (5, 33, 513),
    (19, 80, 1000),
    (1, 70, 769),
    (385, 17, 31),
    (2, 20, 4097),
    (3, 17, 8195),
]
ACTIVATIONS = ["none", "relu", "gelu", "gelu_tanh", "silu"]


@dataclass
class Case:
    """Inputs of one product; several, where one has too few outputs for its error to mean much."""

    inputs: list[Tensor]
    weight: Tensor

    def each(self, f: Callable[[Tensor], Tensor]) -> Tensor:
        return torch.cat([f(x).flatten() for x in self.inputs])


def make_case(shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    m, n, k = shape
    repeats = min(64, -(-256 // (m * n)))
    inputs = [torch.randn(m, k).to(dtype) for _ in range(repeats)]
    return Case(inputs, (torch.randn(n, k) / k**0.5).to(dtype))


def packed_int8() -> tuple[Tensor, Tensor]:
    """Weights of 18 by 20, and a scale a row."""
    w = torch.randint(-127, 128, (18, 20), dtype=torch.int8)
    return ops.pack_int8_linear_weight(w), torch.rand(18) / 100


def linear64(x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    return F.linear(x.double(), w.double(), None if b is None else b.double())


def poison(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """What lies between the elements of a view: NaN, or a large integer."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else 111, dtype=dtype)


def layouts(x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The same values as ``x`` (..., k), two dimensions at least, in memory as it can be found."""
    yield "contiguous", x.contiguous()
    yield "transposed", x.transpose(-1, -2).contiguous().transpose(-1, -2)
    wide = poison((*x.shape[:-1], 2 * x.shape[-1] + 3), x.dtype)
    wide[..., 1 : 1 + x.shape[-1]] = x
    yield "columns of a wider one", wide[..., 1 : 1 + x.shape[-1]]
    wide[..., ::2][..., : x.shape[-1]] = x
    yield "every second column", wide[..., ::2][..., : x.shape[-1]]
    tall = poison((*x.shape[:-2], 3 * x.shape[-2], x.shape[-1]), x.dtype)
    tall[..., ::3, :] = x
    yield "every third row", tall[..., ::3, :]
    for offset in (1, 3, 7):
        store = poison((x.numel() + offset,), x.dtype)
        store[offset:] = x.flatten()
        yield f"{offset} elements off", store[offset:].view(x.shape)
