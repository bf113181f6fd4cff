"""pybigmodel's poolings in channels_last, as its layers call them."""

from __future__ import annotations

from typing import Any

import torch
from pool_results import MAX, MEAN
from pool_shapes import Pooling
from torch import Tensor

from peers import Contender
from peers.torch_pool import pool_contender


def build(problem: Pooling) -> Contender:
    op: Any = getattr(torch.ops.pybigmodel, problem.op).default
    arguments = (*_arguments(problem), True)

    def call(x: Tensor) -> Tensor:
        y: Tensor = op(x, *arguments)
        return y

    return pool_contender(problem, call)


def _arguments(problem: Pooling) -> tuple[Any, ...]:
    """Between the image and the layout of the result."""
    windows = ([problem.k] * 2, [problem.s] * 2, [problem.padding] * 2)
    ceil_mode = False
    if problem.op == MAX:
        dilation = [1, 1]
        return *windows, dilation, ceil_mode
    if problem.op == MEAN:
        count_include_pad, divisor = True, 0
        return *windows, ceil_mode, count_include_pad, divisor
    output_size = [1, 1]
    return (output_size,)
