"""torch.nn.functional.linear, what a model calls today."""

from __future__ import annotations

from functools import partial

import torch
from shapes import Product

from peers import Contender

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def build(problem: Product) -> Contender:
    # A quantised op is compared with the fp32 layer that it replaces.
    dtype = DTYPES.get(problem.precision, torch.float32)
    data = problem.data
    x, bias = data.x.to(dtype), data.bias.to(dtype)
    weights = [data.weight.to(dtype, copy=True) for _ in range(problem.copies)]
    calls = [partial(torch.nn.functional.linear, x, w, bias) for w in weights]
    return Contender.of_linear(
        problem, calls, precision=None if problem.precision in DTYPES else "fp32"
    )
