"""What a call costs when there is nothing to do: 64×64, one row, under no_grad."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from peers import Contender
from shapes import Product

from pybigmodel import nn, ops

PROBLEMS = [Product("linear_call", "fp32", 1, 64, 64, threads=threads) for threads in (1, 2)]


def build(provider: str, problem: Product) -> Contender:
    data = problem.data
    x, weight, bias = data.x, data.weight, data.bias
    if provider == "torch_eager":
        call = partial(torch.nn.functional.linear, x, weight, bias)
    elif provider == "torch_module":
        call = partial(_module(torch.nn.Linear, problem), x)
    elif provider == "pybigmodel_module":
        call = partial(_module(nn.Linear, problem), x)
    elif provider == "pybigmodel":
        packed = ops.pack_linear_weight(weight, "fp32")
        call = partial(ops.linear_packed, x, packed, problem.n, bias)
    else:
        packed = ops.pack_linear_weight(weight, "fp32")
        op = torch.ops.pybigmodel.linear_packed.default
        call = partial(op, x, packed, problem.n, bias, None, 0)
    return Contender.of_linear(problem, [call])


def _module(kind: type[torch.nn.Linear], problem: Product) -> torch.nn.Module:
    module = kind(problem.k, problem.n).eval()
    state = {"weight": problem.data.weight, "bias": problem.data.bias}
    module.load_state_dict(state)
    return module


@pytest.mark.parametrize(
    "provider",
    ["pybigmodel", "pybigmodel_raw_op", "pybigmodel_module", "torch_eager", "torch_module"],
)
@pytest.mark.parametrize("problem", PROBLEMS, ids=str)
def test_call(problem: Product, provider: str, measure: Any) -> None:
    measure(problem, provider, build)
