"""optimize weighs a convolution with what it does beside its product."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from pybigmodel import _follow, _measure, optimize, report
from pybigmodel._fuse import Taken
from pybigmodel._measure import difference


@pytest.mark.parametrize("after", [0.0, 0.2])
def test_a_slower_one_may_gain_by_what_follows_it(
    after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch's convolution is followed by passes of their own, which count with it."""
    monkeypatch.setattr(_measure, "time_pair", lambda *_: (1.0, 1.1))
    monkeypatch.setattr(
        _follow, "_seconds_after", lambda _, taken: after if taken.activation else 0.0
    )
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1)
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 3, 12, 12)
    fused = optimize(model, example_inputs=x)
    first, last = report(fused)
    assert last.left == "not faster on example_inputs: 0.91×"
    if after:
        assert first.left is None and first.norm == "1" and first.activation == "relu"
        assert first.speedup == pytest.approx(1.2 / 1.1)
    else:
        assert first.left == last.left and type(fused) is nn.Sequential
    with torch.no_grad():
        assert difference(fused(x), model(x))[0] < 1e-5


def test_what_follows_is_timed() -> None:
    """Of an output's kind, by torch's functions; nothing takes no time."""
    norm, like = nn.BatchNorm2d(64), partial(torch.empty, 1, 64, 56, 56)
    one = _follow._seconds_after(like, Taken("relu"))
    all_three = _follow._seconds_after(like, Taken("relu", norm, residual=True))
    assert _follow._seconds_after(like, Taken()) == 0 < one < all_three
