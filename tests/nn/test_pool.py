"""Pooling layers: drop-ins for torch's."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import pybigmodel as pbm
from pybigmodel import _native
from pybigmodel.testing import assert_exact

LAYERS: dict[str, tuple[type[nn.Module], type[nn.Module], tuple[Any, ...]]] = {
    "max": (pbm.nn.MaxPool2d, nn.MaxPool2d, (3, 2, 1)),
    "max, uneven": (pbm.nn.MaxPool2d, nn.MaxPool2d, ((2, 3), None, 1, (2, 1), False, True)),
    "mean": (pbm.nn.AvgPool2d, nn.AvgPool2d, (3, 2, 1, True, False)),
    "mean, divisor": (pbm.nn.AvgPool2d, nn.AvgPool2d, ((2, 4), None, 0, False, True, 3)),
    "all": (pbm.nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d, (1,)),
    "all, parts": (pbm.nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool2d, ((3, None),)),
}


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    ours, torchs, arguments = LAYERS[name]
    return ours(*arguments), torchs(*arguments)


def image(last: bool = True) -> Tensor:
    layout = torch.channels_last if last else torch.contiguous_format
    return torch.randn(2, 20, 11, 9).to(memory_format=layout)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether a call, and each after it, was one of this library's ops."""
    calls: list[bool] = []
    for ours in {ours for ours, _, _ in LAYERS.values()}:
        run = ours._pooled
        monkeypatch.setattr(
            ours, "_pooled", lambda s, x, run=run: (calls.append(True), run(s, x))[1]
        )
    return calls


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("last", [False, True])
def test_as_torchs(name: str, last: bool, ran: list[bool]) -> None:
    ours, torchs = pair(name)
    x = image(last)
    for given in (x, x.bfloat16(), x.half(), x[0], x[:0]):
        y, exact = ours(given), torchs(given.float())
        assert y.dtype == given.dtype and y.shape == exact.shape
        eps = torch.finfo(given.dtype).eps
        torch.testing.assert_close(y.float(), exact, rtol=eps, atol=max(eps / 8, 1e-6))
    assert len(ran) == 5 and _native.last_kernel().startswith("pool.")
    layout = torch.channels_last if last else torch.contiguous_format
    assert ours(x).is_contiguous(memory_format=layout)
    assert repr(ours) == repr(torchs)


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_are_torchs(name: str, ran: list[bool]) -> None:
    ours, torchs = pair(name)
    x = image().requires_grad_()
    (got,), (exact,) = (torch.autograd.grad(f(x).square().sum(), x) for f in (ours, torchs))
    assert_exact(got, exact)
    assert not ran
    with torch.no_grad():
        assert not ours(x).requires_grad
    assert len(ran) == 1


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", LAYERS)
def test_what_the_ops_do_not_take_is_torchs(name: str, ran: list[bool]) -> None:
    ours, torchs = pair(name)
    x = image()
    assert_exact(ours(x.double()), torchs(x.double()))
    assert ours(x.to("meta")).shape == torchs(x).shape
    assert_exact(torch.func.vmap(ours)(x.unsqueeze(0)), torchs(x).unsqueeze(0))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x.contiguous(), torch.ones_like(x))
        tangents = [forward_ad.unpack_dual(f(dual)).tangent for f in (ours, torchs)]
        assert_exact(*tangents)
    assert_exact(torch.fx.symbolic_trace(nn.Sequential(ours))(x), torchs(x))
    assert not ran


def test_indices_are_torchs(ran: list[bool]) -> None:
    x = image()
    ours, torchs = pbm.nn.MaxPool2d(2, return_indices=True), nn.MaxPool2d(2, return_indices=True)
    for got, exact in zip(ours(x), torchs(x), strict=True):
        assert_exact(got, exact)
    assert not ran


@pytest.mark.parametrize("name", LAYERS)
def test_compiled_and_exported(name: str) -> None:
    ours, torchs = pair(name)
    x = image()
    torch._dynamo.reset()
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    assert_exact(compiled(x), torchs(x))
    assert_exact(torch.export.export(nn.Sequential(ours), (x,)).module()(x), torchs(x))
    torch._dynamo.reset()


def test_copies_and_assigned_attributes() -> None:
    layer = pbm.nn.MaxPool2d(3)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(other) is pbm.nn.MaxPool2d and other.kernel_size == 3
    layer.stride = 1
    x = image()
    assert_exact(layer(x), nn.MaxPool2d(3, 1)(x))


TWO = np.int64(2)
FORMS: list[tuple[str, tuple[Any, ...]]] = [
    ("MaxPool2d", ((3,),)),
    ("MaxPool2d", ([3], (2,), (1,), (1,))),
    ("MaxPool2d", (TWO, TWO, 1, TWO)),
    ("MaxPool2d", ((TWO, 3), ())),
    ("AvgPool2d", ((3,), (2,), (1,))),
    ("AvgPool2d", (2, (TWO,))),
    ("AvgPool2d", (2, ())),
    ("AdaptiveAvgPool2d", (0,)),
    ("AdaptiveAvgPool2d", ((0, None),)),
    ("AdaptiveAvgPool2d", ((TWO, 3),)),
]


@pytest.mark.parametrize(("name", "arguments"), FORMS)
def test_arguments_in_the_forms_that_torch_takes(name: str, arguments: tuple[Any, ...]) -> None:
    ours, torchs = (getattr(module, name)(*arguments) for module in (pbm.nn, nn))
    for x in (image(), image()[0]):
        torch.testing.assert_close(ours(x), torchs(x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: pbm.nn.MaxPool2d(12)(x),
        lambda x: pbm.nn.AvgPool2d(2, padding=2)(x),
        lambda x: pbm.nn.AvgPool2d(2, divisor_override=0)(x),
    ],
)
def test_refusals(call: Callable[[Tensor], Tensor]) -> None:
    said = r"(?i)pool2d: (the kernel reaches|padding must be|divisor_override must not be 0)"
    with pytest.raises(RuntimeError, match=said):
        call(image())
