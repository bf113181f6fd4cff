"""Fixtures of every test: a fixed seed, the tiers of CPU kernels, torch's threads."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from pybigmodel.testing import available_isas, force_isa


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(20261122)


@pytest.fixture(params=available_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test runs once on every tier that this CPU has; the value is the tier's name."""
    with force_isa(request.param) as name:
        yield name


@pytest.fixture
def threads() -> Iterator[None]:
    """The test may call torch.set_num_threads; the number before is restored."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
