"""torch's poolings: eager in both layouts, compiled."""

from __future__ import annotations

from collections.abc import Callable

import torch
from pool_results import MAX, WHOLE
from pool_shapes import Pooling
from torch import Tensor, nn

from peers import Contender, Unavailable
from peers.images import image_contender
from peers.torch_compile import frozen
from peers.torch_eager import DTYPES

_DTYPES = DTYPES | {"int8": torch.uint8}


def pool_contender(
    problem: Pooling,
    call: Callable[[Tensor], Tensor],
    layout: torch.memory_format = torch.channels_last,
) -> Contender:
    """Of `call(x)` with each copy of x in the problem's dtype and this layout."""
    return image_contender(problem, call, _DTYPES[problem.precision], layout)


def build(problem: Pooling) -> Contender:
    """torch.nn.functional's, what a model calls today."""
    return pool_contender(problem, problem.function, torch.contiguous_format)


def build_channels_last(problem: Pooling) -> Contender:
    if problem.precision == "int8" and problem.h**2 > 255:
        raise Unavailable("it counts the pixels of an image of uint8 in uint8")
    return pool_contender(problem, problem.function)


def build_compiled(problem: Pooling) -> Contender:
    """In channels_last; several inputs in rotation share the compiled layer."""
    x = problem.data.x.to(_DTYPES[problem.precision]).contiguous(memory_format=torch.channels_last)
    return pool_contender(problem, frozen(_layer(problem), x))


def _layer(problem: Pooling) -> nn.Module:
    if problem.op == WHOLE:
        return nn.AdaptiveAvgPool2d(1)
    layer = nn.MaxPool2d if problem.op == MAX else nn.AvgPool2d
    return layer(problem.k, problem.s, problem.padding)
