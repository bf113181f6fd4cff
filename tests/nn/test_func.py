"""The layers under torch.func: torch.nn.Linear's derivatives, or a clear error."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    stack_module_state,
    vjp,
    vmap,
)

import pybigmodel as pbm
from pybigmodel.nn import _packing

K, N = 40, 24

pytestmark = [
    # No batching rules: torch loops, and says so.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    # torch 2.13's own, at the first use of forward mode.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


@pytest.fixture
def pair() -> tuple[pbm.nn.Linear, nn.Linear]:
    torch.manual_seed(0)
    theirs = nn.Linear(K, N)
    ours = pbm.nn.Linear(K, N)
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        ours(torch.randn(3, K))  # packed: the copy must not be used
    return ours, theirs


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(5, K, generator=torch.Generator().manual_seed(1))


def values(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in layer.named_parameters()}


def loss(layer: nn.Module) -> Callable[..., torch.Tensor]:
    return lambda parameters, x: functional_call(layer, parameters, (x,)).square().sum()


REVERSE = {
    "grad": lambda layer, x: grad(lambda x: layer(x).square().sum())(x),
    "grad of parameters": lambda layer, x: grad(loss(layer))(values(layer), x),
    "per sample": lambda layer, x: vmap(grad(loss(layer)), (None, 0))(values(layer), x),
    "ensemble": lambda layer, x: vmap(grad(loss(layer)), (0, None))(
        {name: torch.stack([v, 2 * v]) for name, v in values(layer).items()}, x
    ),
    "jacrev": lambda layer, x: jacrev(layer)(x),
    "vjp": lambda layer, x: vjp(layer, x)[1](torch.ones(5, N)),
    "vmap": lambda layer, x: vmap(layer)(x),
    "grad of vmap": lambda layer, x: grad(lambda x: vmap(layer)(x).square().sum())(x),
    "vmap of vmap of grad": lambda layer, x: vmap(vmap(grad(lambda v: layer(v).sum())))(x[None]),
    "autograd of vmap": lambda layer, x: torch.autograd.grad(vmap(layer)(x).sum(), layer.weight),
}


@pytest.mark.parametrize("transform", REVERSE.values(), ids=REVERSE.keys())
def test_reverse_mode_is_torchs(transform, pair, x) -> None:
    ours, theirs = pair
    torch.testing.assert_close(transform(ours, x), transform(theirs, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["grad of parameters", "per sample"])
def test_compiled(name, pair, x) -> None:
    torch._dynamo.reset()
    ours, theirs = pair

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: torch.Tensor) -> object:
        return REVERSE[name](ours, x)

    torch.testing.assert_close(run(x), REVERSE[name](theirs, x), rtol=1e-4, atol=1e-4)


def test_the_raw_op(x) -> None:
    weight = torch.randn(N, K)

    def ours(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.pybigmodel.linear.default(x, weight, None, 0)

    got = grad(lambda x: ours(x).square().sum())(x)
    expected = grad(lambda x: nn.functional.linear(x, weight).square().sum())(x)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="linear: forward-mode derivatives"):
        jvp(ours, (x,), (x,))


@pytest.mark.parametrize("no_grad", [False, True])
def test_forward_mode_is_refused(no_grad: bool, pair, x) -> None:
    ours, theirs = pair
    int8 = pbm.nn.Int8Linear.from_linear(theirs)
    with torch.set_grad_enabled(not no_grad):
        for layer in (ours, int8):
            for transform in (lambda f, x: jvp(f, (x,), (x,)), lambda f, x: jacfwd(f)(x)):
                named = f"nn.{type(layer).__name__}: input is a dual tensor"
                with pytest.raises(NotImplementedError, match=named):
                    transform(layer, x)


def test_second_derivatives_are_refused(pair, x) -> None:
    ours, _ = pair

    def f(x: torch.Tensor) -> torch.Tensor:
        return ours(x).square().sum()

    with pytest.raises(NotImplementedError, match="linear: forward-mode derivatives"):
        hessian(f)(x)
    for second in (jacrev(jacrev(f)), grad(lambda x: grad(f)(x).sum())):
        with pytest.raises(RuntimeError, match=r"ops.linear: the gradient of its gradient"):
            second(x)


def test_int8_refuses_by_name(pair, x) -> None:
    int8 = pbm.nn.Int8Linear.from_linear(pair[1])
    torch.testing.assert_close(vmap(int8)(x), int8(x), rtol=0, atol=0)
    for transform in (grad, lambda f: vmap(grad(f)), jacrev):
        with pytest.raises(RuntimeError, match="Int8Linear is for inference: a gradient"):
            transform(lambda x: int8(x).sum())(x)


def test_a_transform_leaves_no_packed_copy_behind(pair, x) -> None:
    ours, _ = pair
    known = dict(_packing._entries)
    grad(loss(ours))(values(ours), x)
    assert _packing._entries == known


@pytest.mark.parametrize("kind", ["optimized", "ConvBnAct2d"])
def test_an_ensemble_of_convolutions_and_norms(kind: str) -> None:
    parts = nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.ReLU()).eval()
    made = {"optimized": pbm.optimize, "ConvBnAct2d": lambda parts: pbm.nn.ConvBnAct2d(*parts)}
    models = [made[kind](copy.deepcopy(parts)).eval() for _ in range(2)]
    with torch.no_grad():
        for model in models:
            next(model.parameters()).normal_()
        states = stack_module_state(models)
        x = torch.randn(2, 8, 9, 9)
        y = vmap(lambda *states: functional_call(models[0], states, (x,)))(*states)
        for model, one in zip(models, y, strict=True):
            torch.testing.assert_close(one, model(x), rtol=1e-4, atol=1e-5)
