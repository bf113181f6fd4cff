"""torch.compile(backend="pybigmodel") while weights and modes change between calls."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compile_cases import Net, assert_same, compiled, image, net
from torch import Tensor, nn

import pybigmodel as pbm
from pybigmodel._graph import weights
from pybigmodel._measure import difference

# Of torch 2.13's own: it loads torch.jit with Inductor, and Dynamo instantiates autograd functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def other_state() -> dict[str, Tensor]:
    return {name: value * 0.5 + 0.1 for name, value in net().state_dict().items()}


# What changes, and how many packed weights are made again.
CHANGES: dict[str, tuple[Callable[[Net], Any], int]] = {
    "nothing": (lambda n: None, 0),
    "in place": (lambda n: n.conv.weight.mul_(2), 1),
    "one element": (lambda n: n.last.weight[3, 4].add_(1), 1),
    "through data": (lambda n: n.linear.weight.data.mul_(2), 1),
    "other data": (lambda n: setattr(n.conv.weight, "data", torch.randn(16, 16, 3, 3)), 1),
    "another Parameter": (
        lambda n: setattr(n.last, "weight", nn.Parameter(torch.randn(24, 16, 1, 1))),
        1,
    ),
    "bias of a fold": (lambda n: n.conv.bias.add_(1), 1),
    "bias alone": (lambda n: (n.last.bias.add_(1), n.linear.bias.add_(1)), 0),
    "mean": (lambda n: n.norm.running_mean.add_(1), 1),
    "variance": (lambda n: n.norm.running_var.mul_(2), 1),
    "another buffer": (lambda n: setattr(n.norm, "running_var", torch.rand(16) + 1), 1),
    "factors": (lambda n: (n.norm.weight.mul_(2), n.norm.bias.data.zero_()), 1),
    "load_state_dict": (lambda n: n.load_state_dict(other_state()), 3),
    "load_state_dict, assigned": (lambda n: n.load_state_dict(other_state(), assign=True), 3),
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_seen(name: str, graphs: list[Any], packings: list[Any]) -> None:
    model = net()
    run = compiled(model)
    assert_same(run, model, image())
    assert len(packings) == 3
    change, again = CHANGES[name]
    with torch.no_grad():
        change(model)
    for _ in range(2):
        assert_same(run, model, image())
    assert len(packings) == 3 + again
    assert len(graphs) == 1


def test_a_step_of_an_optimizer_is_seen(graphs: list[Any]) -> None:
    model = net()
    run, optimizer = compiled(model), torch.optim.AdamW(model.parameters(), 0.01, fused=True)
    x = image()
    for _ in range(2):
        assert_same(run, model, x)
        model(x).square().sum().backward()
        optimizer.step()  # fused: it moves no version counter
    assert_same(run, model, x)


def test_training_in_between(graphs: list[Any]) -> None:
    model = net()
    run, x = compiled(model), image(8)
    assert_same(run, model, x)
    for mode in (True, False):
        model.train(mode)
        other = copy.deepcopy(model)
        y, expected = run(x), other(x)
        assert difference(y, expected)[0] < 1e-5
        y.square().sum().backward(), expected.square().sum().backward()
        for (name, p), q in zip(model.named_parameters(), other.parameters(), strict=True):
            if mode and name == "conv.bias":  # before a norm of the batch: rounding errors
                assert float(p.grad.abs().max()) < 1e-3
            else:
                assert difference(p.grad, q.grad)[0] < 1e-4
        for p, q in zip(model.buffers(), other.buffers(), strict=True):
            assert difference(p.float(), q.float())[0] < 1e-5
        model.zero_grad()
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.9)
    model.eval()
    assert_same(run, model, x)


def test_training_is_on_our_ops(graphs: list[Any]) -> None:
    model = net().train()
    run = compiled(model)
    run(image(8)).sum().backward()
    names = [str(n.target) for n in graphs[-1].nodes if n.op == "call_function"]
    assert names.count("pybigmodel.conv.default") == 2
    assert names.count("pybigmodel.linear.default") == 1
    for p in model.parameters():  # frozen: nothing is recorded
        p.requires_grad_(False)
    compiled(model.eval())(image())
    names = [str(n.target) for n in graphs[-1].nodes if n.op == "call_function"]
    assert names.count("pybigmodel.conv_packed.default") == 2


def test_a_frozen_part(graphs: list[Any]) -> None:
    model = net()
    for part in (model.conv, model.norm):
        part.requires_grad_(False)
    other = copy.deepcopy(model)
    run, x = compiled(model), image()
    for _ in range(2):
        y, expected = run(x), other(x)
        assert difference(y, expected)[0] < 1e-5
        y.square().sum().backward(), expected.square().sum().backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or difference(p.grad, q.grad)[0] < 1e-4
    names = [str(n.target) for n in graphs[-1].nodes if n.op == "call_function"]
    assert names.count("pybigmodel.conv_packed.default") == 1
    assert names.count("pybigmodel.conv.default") == 1
    with torch.no_grad():
        model.conv.weight.mul_(2), other.conv.weight.mul_(2)
    assert difference(run(x), other(x))[0] < 1e-5


def test_no_grad_within_the_forward(graphs: list[Any]) -> None:
    model = net()

    def forward(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = model.conv(x)
        return F.relu(model.last(y + x))  # the sum is recorded, the convolution is not

    x = image().requires_grad_()
    y, expected = compiled(forward)(x), forward(x)
    assert difference(y, expected)[0] < 1e-5
    (got,) = torch.autograd.grad(y.square().sum(), x)
    assert difference(got, torch.autograd.grad(expected.square().sum(), x)[0])[0] < 1e-5
    names = [str(n.target) for n in graphs[-1].nodes if n.op == "call_function"]
    assert names.count("pybigmodel.conv_packed.default") == 1


def test_what_may_change_unseen_is_packed_at_each_call(
    graphs: list[Any], packings: list[Any]
) -> None:
    model = net().share_memory()
    run = compiled(model)
    for i in range(1, 4):
        assert_same(run, model, image())
        assert len(packings) == 3 * i
    with torch.inference_mode():
        model = net()
        model.load_state_dict(other_state(), assign=True)
    packings.clear()
    run = compiled(model)
    for i in range(1, 3):
        x = image()
        with torch.inference_mode():
            assert difference(run(x), model(x))[0] < 1e-5
        assert len(packings) == 3 * i


def test_tied_weights_are_packed_once(graphs: list[Any], packings: list[Any]) -> None:
    layer, embedding = nn.Linear(16, 40, bias=False), nn.Embedding(40, 16)
    layer.weight = embedding.weight

    def forward(ids: Tensor) -> Tensor:
        return layer(torch.tanh(layer(embedding(ids)) @ embedding.weight))

    run, ids = compiled(forward), torch.arange(5)
    with torch.no_grad():
        assert difference(run(ids), forward(ids))[0] < 1e-5
        layer.weight.mul_(0.5)
        assert difference(run(ids), forward(ids))[0] < 1e-5
    assert len(packings) == 2
    assert [str(n.target) for n in graphs[-1].nodes].count("pybigmodel.linear_packed.default") == 2


def test_the_model_can_be_freed(graphs: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Any] = []

    class State(weights._State):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            states.append(self)

    monkeypatch.setattr(weights, "_State", State)
    model = net()
    run = compiled(model)
    assert_same(run, model, image())
    state = states[-1]
    copies = [weakref.ref(copy) for copy in state.flat]
    assert all(copy() is not None for copy in copies)
    conv = weakref.ref(model.conv)
    del model, run
    gc.collect()
    assert conv() is None
    assert not any(copy() is not None for copy in copies)


def test_layers_can_be_told_to_forget(graphs: list[Any], packings: list[Any]) -> None:
    fast = pbm.optimize(net())
    run, x = compiled(fast), image()
    with torch.no_grad():
        before = run(x)
        fast.conv.weight.data[3, 4, 1, 1] += 5  # one element, between those that are compared
        fast.conv.forget_packed()
        after = run(x)
        assert difference(after, before)[0] > 1e-3
        assert difference(after, fast(x))[0] < 1e-5
    assert len(packings) == 4
