"""Convolution, tap by tap, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, product
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from pybigmodel.reference.linear import ACTIVATION_FUNCTIONS

Index: TypeAlias = tuple[Any, ...]

CONV_ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATION_FUNCTIONS,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
}


def activate(x: Tensor, activation: str, negative_slope: float = 0.01) -> Tensor:
    if activation == "leaky_relu":
        return F.leaky_relu(x, negative_slope)
    return CONV_ACTIVATION_FUNCTIONS[activation](x)


def conv(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
    activation: str = "none",
    negative_slope: float = 0.01,
    residual: Tensor | None = None,
) -> Tensor:
    """``act(x * w + b + r)`` in the tensors' own dtype; padding: before and after, by axis."""
    x = F.pad(input, list(chain(*reversed(padding))))
    sizes = [
        (size - step * (k - 1) - 1) // s + 1
        for size, k, s, step in zip(x.shape[2:], weight.shape[2:], stride, dilation, strict=True)
    ]
    x, filters = _grouped(x, groups, 1), _grouped(weight, groups, 0)
    y = x.new_zeros((x.shape[0], groups, filters.shape[1], *sizes))
    for tap, window in _taps(weight.shape[2:], sizes, stride, dilation):
        y = y + torch.einsum("goc,ngc...->ngo...", filters[tap], x[window])
    y = _with_bias(y.flatten(1, 2), bias)
    return activate(y if residual is None else y + residual, activation, negative_slope)


def conv_transpose(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """What conv's gradient does to its output: each pixel of input adds the kernel to y."""
    x, filters = _grouped(input, groups, 1), _grouped(weight, groups, 0)
    whole = [
        (size - 1) * s + step * (k - 1) + 1 + more
        for size, s, step, k, more in zip(
            input.shape[2:], stride, dilation, weight.shape[2:], output_padding, strict=True
        )
    ]
    y = x.new_zeros((x.shape[0], groups, weight.shape[1], *whole))
    for tap, window in _taps(weight.shape[2:], input.shape[2:], stride, dilation):
        y[window] += torch.einsum("gco,ngc...->ngo...", filters[tap], x)
    cut = (slice(a, size - b) for size, (a, b) in zip(whole, padding, strict=True))
    inside: Index = (..., *cut)
    return _with_bias(y[inside].flatten(1, 2), bias)


def _grouped(tensor: Tensor, groups: int, dim: int) -> Tensor:
    shape = tensor.shape
    return tensor.reshape(*shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :])


def _with_bias(y: Tensor, bias: Tensor | None) -> Tensor:
    return y if bias is None else y + bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2))


def _taps(
    kernel: Sequence[int], sizes: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> Iterator[tuple[Index, Index]]:
    """Each tap, and the pixels that it meets in an image of the larger of the two sizes."""
    for tap in product(*map(range, kernel)):
        first = [t * step for t, step in zip(tap, dilation, strict=True)]
        window = (
            slice(at, at + (size - 1) * s + 1, s)
            for at, size, s in zip(first, sizes, stride, strict=True)
        )
        yield (..., *tap), (..., *window)
