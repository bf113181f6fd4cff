"""A small model, its input, and timings that do not depend on the machine."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pybigmodel import _measure


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 64)
        self.body = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64, bias=False))
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.body(torch.relu(self.first(x)))))


@pytest.fixture
def model() -> MLP:
    torch.manual_seed(0)
    return MLP()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(7, 40, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def twice_as_fast(monkeypatch) -> list[nn.Module]:
    """Timings that do not depend on the machine; the originals that were timed."""
    timed = []

    def time_pair(original, candidate, input):
        timed.append(original)
        return 2.0, 1.0

    monkeypatch.setattr(_measure, "time_pair", time_pair)
    return timed
