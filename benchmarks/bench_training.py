"""A linear layer in training: the weight changes at every step, so nothing is packed beforehand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from peers import Contender, Errors
from peers.torch_eager import DTYPES
from shapes import COMPUTE_M, Product, problems

from pybigmodel import ops

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
PROVIDERS: dict[str, Linear] = {
    "pybigmodel": ops.linear,
    "torch_eager": torch.nn.functional.linear,
}
FORWARD, FORWARD_BACKWARD = "linear_forward", "linear_forward_backward"


class Step:
    """One training step's worth of a layer: x, W, b that want gradients, and dY."""

    def __init__(self, problem: Product, dtype: torch.dtype) -> None:
        data = problem.data
        tensors = (data.x, data.weight, data.bias)
        self.leaves = [t.to(dtype, copy=True).requires_grad_() for t in tensors]
        generator = torch.Generator().manual_seed(1)
        self.grad = torch.randn(problem.m, problem.n, generator=generator).to(dtype)

    def forward(self, linear: Linear) -> Sequence[torch.Tensor]:
        with torch.enable_grad():
            return [linear(*self.leaves)]

    def forward_backward(self, linear: Linear) -> Sequence[torch.Tensor]:
        with torch.enable_grad():
            return torch.autograd.grad(linear(*self.leaves), self.leaves, self.grad)


def build(provider: str, problem: Product) -> Contender:
    backward = problem.op == FORWARD_BACKWARD

    def call(step: Step, linear: Linear) -> Sequence[torch.Tensor]:
        return step.forward_backward(linear) if backward else step.forward(linear)

    measured = Step(problem, DTYPES[problem.precision])
    linear = PROVIDERS[provider]

    def errors() -> Errors:
        exact = call(Step(problem, torch.float64), torch.nn.functional.linear)
        return Errors.of(call(measured, linear), exact)

    # dX and dW are two more products of the same size.
    operations = problem.operations * (3 if backward else 1)
    return Contender([partial(call, measured, linear)], errors, operations=operations)


def _problems(op: str) -> list[Product]:
    return [p for d in ("fp32", "bf16") for p in problems(op, d, COMPUTE_M, threads=(2,))]


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", _problems(FORWARD), ids=str)
def test_linear_forward(problem: Product, provider: str, measure: Any) -> None:
    measure(problem, provider, build)


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("problem", _problems(FORWARD_BACKWARD), ids=str)
def test_linear_forward_backward(problem: Product, provider: str, measure: Any) -> None:
    measure(problem, provider, build)
