"""What the peers of convolutions and of poolings share."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from conv_problem import ConvProblem
from pool_shapes import Pooling
from torch import Tensor

from peers import Contender, Errors

ImageProblem = ConvProblem | Pooling


def image_contender(
    problem: ImageProblem,
    call: Callable[[Tensor], Tensor],
    dtype: torch.dtype,
    layout: torch.memory_format = torch.channels_last,
    **options: Any,
) -> Contender:
    """Of `call(x)` with each copy of x in this dtype and layout."""
    data = problem.data
    inputs = [
        data.x.to(dtype, copy=True).contiguous(memory_format=layout) for _ in range(problem.copies)
    ]
    calls = [partial(call, x) for x in inputs]
    return Contender(calls, lambda: Errors.of([calls[0]()], [data.exact]), **options)
