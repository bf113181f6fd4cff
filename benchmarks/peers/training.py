"""What a layer costs in training."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def forward_backward(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor
) -> Callable[[], Sequence[Tensor]]:
    """A training step's worth of `function`: the gradients of all its inputs."""
    leaves = [t.clone().requires_grad_() for t in inputs]

    def call() -> Sequence[Tensor]:
        with torch.enable_grad():
            return torch.autograd.grad(function(*leaves), leaves, grad)

    return call
