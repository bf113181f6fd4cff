"""optimize where an activation follows a linear layer, in modules of others: one pass for both."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pybigmodel as pbm
from pybigmodel._fuse import Fused
from pybigmodel._measure import difference

E, N = 40, 7


class Parts(nn.Module):
    def __init__(self, act: Any = None) -> None:
        super().__init__()
        self.dense, self.out = nn.Linear(E, 64), nn.Linear(64, E)
        self.act = nn.GELU() if act is None else act
        self.dropout = nn.Dropout(0.0)


class Nested(Parts):
    def forward(self, x: Tensor, *, scale: float = 1.0) -> Tensor:
        return self.out(self.dropout(self.act(self.dense(x)))) * scale


class InTwoSteps(Parts):
    def forward(self, hidden: Tensor) -> Tensor:
        hidden = self.dense(hidden)
        hidden = self.act(hidden)
        hidden = self.dropout(hidden)
        if hidden.shape[-1] == 64:
            hidden = self.out(hidden)
            hidden = F.relu(hidden)
        return hidden


class Gated(Parts):
    def __init__(self) -> None:
        super().__init__(nn.SiLU())
        self.up = nn.Linear(E, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.act(self.dense(x)) * self.up(x))


class OfFunctions(Parts):
    def forward(self, x: Tensor) -> Tensor:
        y = [F.relu(self.dense(part)) for part in x.split(3)]
        return F.silu(self.out(torch.cat(y)))


def sequential() -> nn.Sequential:
    return nn.Sequential(nn.Linear(E, 64), nn.GELU("tanh"), nn.Dropout(0.0), nn.Linear(64, E))


MODELS = {
    "nested": (Nested, ["gelu", None]),
    "in two steps": (InTwoSteps, ["gelu", "relu"]),
    "gated": (Gated, ["silu", None, None]),
    "of functions": (OfFunctions, ["relu", "silu"]),
    "sequential": (sequential, ["gelu_tanh", None]),
}


class Widened(nn.Module):
    """What adapters wrap a layer in."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + 1.0


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, E, generator=torch.Generator().manual_seed(1))


def activations(model: nn.Module) -> list[str | None]:
    return [row.activation for row in pbm.report(model)]


def calls(model: nn.Module, x: Tensor) -> list[str]:
    """The ops that run, without gradients."""
    with torch.no_grad():
        model(x)  # packs
        with torch.profiler.profile() as profile:
            model(x)
    return [event.name for event in profile.events()]


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", MODELS)
def test_one_pass(name: str, precision: str, x: Tensor) -> None:
    torch.manual_seed(0)
    make, expected = MODELS[name]
    model = make()
    fused = pbm.optimize(model, precision)
    assert activations(fused) == expected
    apart = copy.deepcopy(fused)
    for layer in apart.modules():  # a hook has them called one by one
        layer.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        assert difference(fused(x), apart(x))[0] < 1e-6
        bound = {"fp32": 1e-6, "bf16": 1e-2, "int8": 3e-2}[precision]
        assert difference(fused(x), model(x))[0] < bound
    ran = calls(fused, x)
    assert not {"aten::relu", "aten::gelu", "aten::silu"} & set(ran)
    assert {"aten::relu", "aten::gelu", "aten::silu"} & set(calls(apart, x))


@pytest.mark.parametrize("name", MODELS)
def test_training(name: str, x: Tensor) -> None:
    model = MODELS[name][0]()
    fused = pbm.optimize(model)
    for one in (model, fused):
        one(x).square().sum().backward()
    for expected, got in zip(model.parameters(), fused.parameters(), strict=True):
        assert difference(got.grad, expected.grad)[0] < 1e-5


@pytest.mark.parametrize("name", MODELS)
def test_copies_pickles_and_compiles(name: str, x: Tensor) -> None:
    fused = pbm.optimize(MODELS[name][0]())
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    with torch.no_grad():
        expected = fused(x)
        for other in (
            copy.deepcopy(fused),
            copy.copy(fused),
            pickle.loads(pickle.dumps(fused)),
            torch.load(file, weights_only=False),
        ):
            assert type(other) is type(fused)
            assert isinstance(other, Fused)
            assert torch.equal(other(x), expected)
        compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
        assert difference(compiled(x), expected)[0] < 1e-6
        exported = torch.export.export(fused, (x,)).module()
        assert difference(exported(x), expected)[0] < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_restore(name: str, x: Tensor) -> None:
    model = MODELS[name][0]()
    restored = pbm.restore(pbm.optimize(model))
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
    assert [vars(m).keys() for m in restored.modules()] == [vars(m).keys() for m in model.modules()]
    assert torch.equal(restored(x), model(x))


def test_is_what_it_was(x: Tensor) -> None:
    fused = pbm.optimize(Nested())
    assert isinstance(fused, Nested)
    kind = type(fused)
    assert (kind.__name__, kind.__qualname__, kind.__module__) == (
        Nested.__name__,
        Nested.__qualname__,
        Nested.__module__,
    )
    assert torch.equal(fused(x, scale=2.0), fused(x) * 2.0)
    with pytest.raises(TypeError, match=r"Nested.forward\(\) got an unexpected keyword .*'wrong'"):
        fused(x, wrong=1)
    assert pbm.optimize(fused, inplace=True) is fused  # again
    assert activations(fused) == ["gelu", None]


@pytest.mark.parametrize("which", ["dense", "act"])
def test_hooks_run(which: str, x: Tensor) -> None:
    model = Nested()
    fused = pbm.optimize(model)
    seen = []
    for one in (model, fused):
        one.get_submodule(which).register_forward_hook(lambda _, args, y: seen.append((args, y)))
    with torch.no_grad():
        assert difference(fused(x), model(x))[0] < 1e-6
    (args, y), (args_fused, y_fused) = seen
    assert difference(args[0], args_fused[0])[0] < 1e-6
    assert difference(y, y_fused)[0] < 1e-6


@pytest.mark.parametrize("sequence", [False, True])
def test_layers_exchanged_since(sequence: bool, x: Tensor) -> None:
    """An adapter around the layer, another activation, a part restored."""
    model = sequential() if sequence else Nested()
    dense, act = ("0", "1") if sequence else ("dense", "act")
    fused = pbm.optimize(model)
    for one in (model, fused):
        setattr(one, dense, Widened(getattr(one, dense)))
    with torch.no_grad():
        assert difference(fused(x), model(x))[0] < 1e-6
        for one in (model, fused):
            setattr(one, dense, getattr(one, dense).layer)
            setattr(one, act, nn.Tanh())
        assert difference(fused(x), model(x))[0] < 1e-6
        pbm.restore(getattr(fused, dense))
        assert torch.equal(fused(x), model(x)) or difference(fused(x), model(x))[0] < 1e-6
        pbm.restore(fused)
        assert torch.equal(fused(x), model(x))


class Decorated(Parts):
    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(x))


class WithSuper(Nested):
    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.dense(super().forward(x)))


class NothingKnown(Parts):
    def forward(self, x: Tensor) -> Tensor:
        return (
            torch.tanh(self.dense(x)) + torch.clamp(self.out(self.act(self.dense(x + 1))), 0)[0, 0]
        )


class Reduced(Nested):
    def __reduce_ex__(self, protocol: Any) -> Any:
        return super().__reduce_ex__(protocol)


def without_source() -> nn.Module:
    space: dict[str, Any] = {"Parts": Parts}
    exec("class New(Parts):\n def forward(self, x): return self.act(self.dense(x))", space)
    return space["New"]()


def with_another_source() -> nn.Module:
    """The file was edited since: what is read there is not what runs."""

    class New(Parts):
        def forward(self, x: Tensor) -> Tensor:
            return self.act(self.dense(x)) + 1.0

    before = InTwoSteps.forward.__code__
    here = New.forward.__code__.co_firstlineno
    New.forward.__code__ = before.replace(co_firstlineno=here, co_filename=__file__)
    return New()


def on_the_instance() -> nn.Module:
    model = Nested()
    model.forward = lambda x: model.act(model.dense(x))
    return model


def with_a_parametrization() -> nn.Module:
    model = Nested()
    model.scale = nn.Parameter(torch.ones(()))
    nn.utils.parametrize.register_parametrization(model, "scale", nn.Identity())
    return model


LEFT = {
    "decorated": Decorated,
    "super": WithSuper,
    "pickles in its own way": Reduced,
    "no source": without_source,
    "another source": with_another_source,
    "forward of the instance": on_the_instance,
    "parametrized": with_a_parametrization,
    "activation unknown": lambda: Nested(nn.Tanh()),
    "a subclass of one that is known": lambda: Nested(type("Own", (nn.ReLU,), {})()),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_as_it_is(name: str, x: Tensor) -> None:
    model = LEFT[name]()
    optimized = pbm.optimize(model, inplace=True)
    assert not isinstance(optimized, Fused)
    assert set(activations(optimized)) == {None}
    optimized(x)


def test_only_the_layers_that_were_replaced(x: Tensor) -> None:
    model = InTwoSteps()
    fused = pbm.optimize(model, exclude="dense")
    assert activations(fused) == [None, "relu"]
    with torch.no_grad():
        assert difference(fused(x), model(x))[0] < 1e-6
    assert "aten::gelu" in calls(fused, x)
