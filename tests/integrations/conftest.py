"""What ran: whose attention, which graphs, and which weights were packed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import pybigmodel as pbm
from pybigmodel import _native


@pytest.fixture
def ours() -> Callable[[Callable[[], Any]], bool]:
    """ours(call): whether a kernel of this library's attention ran in it, in whatever thread."""

    def ran(call: Callable[[], Any]) -> bool:
        pbm.ops.linear(torch.ones(1, 2), torch.ones(3, 2))
        before = _native.last_kernel()
        call()
        after = _native.last_kernel()
        assert after == before or after.startswith("attention"), after
        return after != before

    return ran


@pytest.fixture
def left() -> Callable[[], dict[str, int]]:
    """left(): the reasons for which calls were left to torch since the test began."""
    before = pbm.integrations.left_to_torch()

    def since() -> dict[str, int]:
        now = pbm.integrations.left_to_torch()
        return {
            reason: n - before.get(reason, 0)
            for reason, n in now.items()
            if n != before.get(reason, 0)
        }

    return since


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The graphs that torch.compile(backend="pybigmodel") hands to inductor, in whose place
    aot_eager runs them: with the fake kernels, without minutes of generated C++. They are as they
    were before convolutions were joined to single calls."""
    import torch._inductor as inductor

    from pybigmodel._graph import compile as ours

    torch._dynamo.reset()
    found = []

    def join(graph: torch.fx.Graph) -> None:
        apart = torch.fx.Graph()
        apart.output(apart.graph_copy(graph, {}))
        found.append(apart)
        join_them(graph)

    def compile(module: Any, inputs: Any, options: Any = None) -> Any:
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    join_them = ours.join
    monkeypatch.setattr(ours, "join", join)
    monkeypatch.setattr(inductor, "compile", compile)
    return found


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is packed with real weights, a recipe each time."""
    from pybigmodel._graph import weights

    made: list[Any] = []
    copies = weights.Recipe.copies

    def noted(self: Any, args: Any, watched: bool) -> Any:
        made.append(self)
        return copies(self, args, watched)

    monkeypatch.setattr(weights.Recipe, "copies", noted)
    return made
