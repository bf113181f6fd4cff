"""A small model, and what the tests of torch.compile(backend="pybigmodel") do with it."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pybigmodel._measure import difference


class Net(nn.Module):
    """A folded convolution, one without a norm, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.last, self.linear = nn.Conv2d(16, 24, 1), nn.Linear(24, 10)
        for name in ("running_mean", "running_var"):
            getattr(self.norm, name).uniform_(0.5, 1.5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm(self.conv(x)) + x)
        return self.linear(F.silu(self.last(x)).mean((2, 3)))


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def image(batch: int = 2, size: int = 9) -> Tensor:
    return torch.randn(batch, 16, size, size)


def compiled(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="pybigmodel", fullgraph=True, **options)


def assert_same(run: Any, model: Net, x: Tensor) -> None:
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert difference(run(x).double(), exact)[0] < 1e-5
