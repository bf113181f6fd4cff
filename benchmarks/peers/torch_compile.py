"""torch.compile with freezing, so that inductor packs the weight and picks its own kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from shapes import Product
from torch import nn

from peers import Contender, Unavailable
from peers.torch_eager import DTYPES

# A frozen graph holds its weight, so each copy is compiled on its own, at a second or two.
MAX_COMPILED_COPIES = 2


def freeze(module: nn.Module, *inputs: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The module bound to `inputs`, frozen and compiled for this thread count and shape."""
    compiled = frozen(module, *inputs)
    return lambda: compiled(*inputs)


def frozen(module: nn.Module, *inputs: torch.Tensor) -> Callable[..., torch.Tensor]:
    """The module frozen and compiled for this thread count and for inputs such as these."""
    import torch._dynamo
    import torch._inductor.config as inductor

    torch._dynamo.reset()
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        warnings.simplefilter("ignore")
        with inductor.patch(freezing=True):
            compiled: Callable[..., torch.Tensor] = torch.compile(module, dynamic=False)
            compiled(*inputs)
            compiled(*inputs)
    return compiled


def linear_module(problem: Product, dtype: torch.dtype) -> nn.Linear:
    """An nn.Linear with the problem's weight and bias."""
    module = nn.Linear(problem.k, problem.n, dtype=dtype).eval().requires_grad_(False)
    with torch.no_grad():
        module.weight.copy_(problem.data.weight)
        module.bias.copy_(problem.data.bias)
    return module


def build(problem: Product) -> Contender:
    if problem.copies > MAX_COMPILED_COPIES:
        raise Unavailable(f"one compilation per weight, and {problem.copies} are in rotation")
    dtype = DTYPES[problem.precision]
    x = problem.data.x.to(dtype)
    return Contender.of_linear(
        problem, [freeze(linear_module(problem, dtype), x) for _ in range(problem.copies)]
    )
