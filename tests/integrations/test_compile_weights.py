"""torch.compile(backend="pybigmodel") while weights, modes and sizes change between calls."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pybigmodel as pbm
from pybigmodel._graph import weights
from pybigmodel._measure import difference

# Of torch 2.13's own: it loads torch.jit with Inductor, and Dynamo instantiates autograd functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


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


@pytest.fixture
def packings(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is packed with real weights, a recipe each time."""
    made: list[Any] = []
    copies = weights.Recipe.copies

    def noted(self: Any, args: Any, watched: bool) -> Any:
        made.append(self)
        return copies(self, args, watched)

    monkeypatch.setattr(weights.Recipe, "copies", noted)
    return made


def assert_same(run: Any, model: Net, x: Tensor) -> None:
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(x.double())
        assert difference(run(x).double(), exact)[0] < 1e-5


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


# --- sizes, dtypes, options -----------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [None, True])
def test_sizes(dynamic: bool | None, graphs: list[Any]) -> None:
    model = net()
    run = compiled(model, dynamic=dynamic)
    assert_same(run, model, image(2, 9))
    if not dynamic:
        assert_same(run, model, image(3, 9))  # from here on the batch may be any
    known = len(graphs)
    for batch in (7, 5, 4):
        assert_same(run, model, image(batch, 9))
    assert len(graphs) == known
    assert_same(run, model, image(4, 12))
    known += not dynamic
    for batch, size in ((6, 17), (3, 30), (2, 8)):
        assert_same(run, model, image(batch, size))
    assert len(graphs) == known
    assert_same(run, model, image(1, 17))  # Dynamo compiles for 1 apart
    for graph in graphs[-2:]:
        names = [str(n.target) for n in graph.nodes]
        assert names.count("pybigmodel.conv_packed.default") == 2
        assert not {"batch_norm", "relu", "silu", "add"} & {n.name for n in graph.nodes}


def test_sizes_in_training(graphs: list[Any]) -> None:
    model = net()
    run = compiled(model, dynamic=True)
    known = set[int]()
    for batch in (2, 3, 8):
        x = image(batch)
        got = torch.autograd.grad(run(x).square().sum(), list(model.parameters()))
        expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
        for p, q in zip(got, expected, strict=True):
            assert difference(p, q)[0] < 1e-4
        known.add(len(graphs))
    assert len(known) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes(dtype: torch.dtype, graphs: list[Any]) -> None:
    model, x = net(), image()
    with torch.no_grad():
        exact = model(x)
        low = copy.deepcopy(model).to(dtype)
        theirs = difference(low(x.to(dtype)).float(), exact)[0]
        y = compiled(low)(x.to(dtype))
        assert y.dtype == dtype
        assert difference(y.float(), exact)[0] < 2 * theirs
    assert [str(n.target) for n in graphs[-1].nodes].count("pybigmodel.conv_packed.default") == 2


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype: torch.dtype, grad: bool, graphs: list[Any]) -> None:
    model, x = net(), image()
    run = compiled(model)

    def within(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=dtype):
            y = model(x)
        return y * 2

    with torch.set_grad_enabled(grad):
        exact = model(x)
        with torch.autocast("cpu", dtype=dtype):
            expected, y = model(x), run(x)
        assert y.dtype == expected.dtype == dtype
        theirs = difference(expected.float(), exact)[0]
        assert difference(y.float(), exact)[0] < 2 * theirs
        y = compiled(within)(x)
        assert y.dtype == dtype
        assert difference(y.float() / 2, exact)[0] < 2 * theirs
        assert difference(run(x), exact)[0] < 1e-5  # not under autocast: compiled anew
    name = "pybigmodel.conv.default" if grad else "pybigmodel.conv_packed.default"
    for graph in graphs:
        assert [str(n.target) for n in graph.nodes].count(name) == 2


def test_options(graphs: list[Any]) -> None:
    model, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 56, 56)
    with torch.no_grad():
        exact = model(x)

        def algorithm(**options: Any) -> tuple[int, float]:
            torch._dynamo.reset()
            error = difference(compiled(model, options=options)(x), exact)[0]
            calls = [n for n in graphs[-1].nodes if "conv_packed" in str(n.target)]
            return calls[0].args[12], error

        assert algorithm()[0] in (3, 4)  # Winograd's
        assert algorithm(exact=True)[0] == 1
        low, error = algorithm(precision="bf16")
        assert low == 1 and 1e-4 < error < 2e-2


def test_the_algorithm_is_that_of_the_first_sizes(graphs: list[Any]) -> None:
    def chosen() -> int:
        (call,) = [n for n in graphs[-1].nodes if "conv_packed" in str(n.target)]
        return call.args[12]  # type: ignore[no-any-return]

    for model, options, sizes, found in (
        (nn.Conv2d(64, 64, 3, padding=1), {}, (56, 5, 2, 30), (4, 4, 4, 4)),
        # In planes up to some size, which is guarded.
        (nn.Conv2d(1, 6, 5), {"channels_last": False}, (20, 30, 600, 25), (6, 6, 2, 6)),
    ):
        torch._dynamo.reset()
        run = compiled(model, dynamic=True, options=options)
        for size, algorithm in zip(sizes, found, strict=True):
            x = torch.randn(2, model.in_channels, size, size)
            with torch.no_grad():
                assert difference(run(x), model(x))[0] < 1e-5
            assert size == 25 or chosen() == algorithm  # 25: the first graph again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exactly": True, "tiles": 4}, "unknown options 'exactly', 'tiles'"),
        ({"precision": "int8"}, "precision must be 'fp32' or 'bf16'; got 'int8'"),
        ({"exact": 1}, "option 'exact' must be a bool, got 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, graphs: list[Any]) -> None:
    with pytest.raises(Exception, match=message), torch.no_grad():
        compiled(net(), options=options)(image())


def test_after_optimize(graphs: list[Any], packings: list[Any]) -> None:
    model = net()
    fused = pbm.optimize(model, exact=True)
    run = compiled(fused, options={"precision": "bf16"})  # which is not the layers'
    with torch.no_grad():
        for _ in range(2):
            x = torch.randn(1, 16, 56, 56)
            assert difference(run(x), model(x))[0] < 1e-5
    calls = [n for n in graphs[-1].nodes if "pybigmodel" in str(n.target) and n.op[0] == "c"]
    assert [n.target.name() for n in calls] == [
        *("pybigmodel::conv_packed", "pybigmodel::conv_packed"),
        *("pybigmodel::adaptive_avg_pool2d", "pybigmodel::linear_packed"),
    ]
    assert calls[0].args[12] == 1 and len(packings) == 3


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


def test_int8_layers(graphs: list[Any]) -> None:
    model = net()
    fast = pbm.optimize(model, "int8")
    run, x = compiled(fast), image()
    with torch.no_grad():
        assert difference(run(x), fast(x))[0] < 1e-5
    names = [str(n.target) for n in graphs[-1].nodes]
    assert names.count("pybigmodel.int8_linear.default") == 1
    assert names.count("pybigmodel.int8_conv.default") == 2
