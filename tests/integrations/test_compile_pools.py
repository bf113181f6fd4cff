"""torch.compile(backend="pybigmodel"): poolings of images in channels_last are this library's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Dynamo's own

_OPS = {
    getattr(torch.ops.pybigmodel, name).default: name
    for name in ("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d")
}


class Net(nn.Module):
    """A convolution, and what is made of its result."""

    def __init__(self, after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.conv, self.after = nn.Conv2d(3, 16, 3, padding=1), after

    def forward(self, x: Tensor) -> Any:
        y = self.conv(x)
        return self.after(y)


CASES: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "max": (lambda y: F.max_pool2d(y, 3, 2, 1), ["max_pool2d"]),
    "max, layer": (nn.MaxPool2d((2, 3), dilation=2, ceil_mode=True), ["max_pool2d"]),
    "max, torch": (lambda y: torch.max_pool2d(y, 2), ["max_pool2d"]),
    "mean": (lambda y: F.avg_pool2d(y, 3, 2, 1, True, False), ["avg_pool2d"]),
    "mean, layer": (nn.AvgPool2d(2, divisor_override=3), ["avg_pool2d"]),
    "all": (nn.AdaptiveAvgPool2d(1), ["adaptive_avg_pool2d"]),
    "all, parts": (nn.AdaptiveAvgPool2d((3, None)), ["adaptive_avg_pool2d"]),
    "all, flat": (lambda y: y.mean((2, 3)), ["adaptive_avg_pool2d"]),
    "all, kept": (lambda y: torch.mean(y, [-1, -2], keepdim=True), ["adaptive_avg_pool2d"]),
    "between": (
        lambda y: F.max_pool2d(torch.sigmoid(y), 2).mean((2, 3)),
        ["max_pool2d", "adaptive_avg_pool2d"],
    ),
    "indices": (nn.MaxPool2d(2, return_indices=True), []),
    "other axes": (lambda y: y.mean((1, 2)), []),
    "no pixels": (lambda y: y[:, :, :0].mean((2, 3)), []),
    "one axis": (lambda y: y.mean(2), []),
    "another dtype": (lambda y: y.mean((2, 3), dtype=torch.float64), []),
}


def pools_in(graph: torch.fx.Graph) -> list[str]:
    return [_OPS[node.target] for node in graph.nodes if node.target in _OPS]


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_poolings(case: str, last: bool, graphs: list[Any]) -> None:
    after, expected = CASES[case]
    model = Net(after).eval()
    x = torch.randn(2, 3, 13, 11)
    if last:
        x = x.to(memory_format=torch.channels_last)
    with torch.no_grad():
        got, exact = torch.compile(model, backend="pybigmodel", fullgraph=True)(x), model(x)
    assert pools_in(graphs[0]) == expected
    pairs = zip(*(y if isinstance(y, tuple) else (y,) for y in (got, exact)), strict=True)
    for y, y0 in pairs:
        assert y.stride() == y0.stride()
        torch.testing.assert_close(y, y0, rtol=1e-5, atol=1e-5, equal_nan=True)


def test_sizes_that_vary(graphs: list[Any]) -> None:
    model = Net(lambda y: (F.max_pool2d(y, 2), y.mean((2, 3)))).eval()
    compiled = torch.compile(model, backend="pybigmodel", fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch, size in ((2, 9), (3, 16), (5, 24)):
            x = torch.randn(batch, 3, size, size)
            for y, y0 in zip(compiled(x), model(x), strict=True):
                assert y.stride() == y0.stride()
                torch.testing.assert_close(y, y0, rtol=1e-5, atol=1e-5)
    assert len(graphs) == 1 and len(pools_in(graphs[0])) == 2


def test_in_training_and_in_planes_they_are_torchs(graphs: list[Any]) -> None:
    model = Net(nn.MaxPool2d(2))
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="pybigmodel", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    pool = torch.compile(lambda x: F.max_pool2d(x, 2), backend="pybigmodel", fullgraph=True)
    assert torch.equal(pool(x), F.max_pool2d(x, 2))
    assert [pools_in(graph) for graph in graphs] == [[], []]
