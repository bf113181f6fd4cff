"""uint8 between int8 convolutions: where it flows, and that nobody else notices."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from int8_models import MODELS, image, made, run
from torch import Tensor, nn

import pybigmodel as pbm
from pybigmodel._measure import difference
from pybigmodel.nn import _int8_plan
from pybigmodel.nn._conv_chain import convolved
from pybigmodel.nn._int8_image import Bytes

# Of each model, how many convolutions give uint8: all but what the mean at its end, a depthwise
# convolution or the model itself takes.
CONNECTED = {"resnet": 14, "resnet, basic": 10, "mobilenet": 17}


def optimized(model: nn.Module, x: Any) -> Any:
    return pbm.optimize(model, "int8", example_inputs=x)


def gives(model: nn.Module) -> dict[str, str | None]:
    return {row.path: row.gives for row in pbm.report(model)}


@pytest.fixture(autouse=True)
def _timings(twice_as_fast: list[nn.Module]) -> None:
    """Every test here decides by errors alone."""


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[torch.dtype, Any, torch.dtype]]:
    """Dtypes of image, residual and result of each int8 convolution."""
    op, calls = _int8_plan.int8_conv_op, []

    def note(*args: Any) -> Tensor:
        y: Tensor = op(*args)
        calls.append((args[0].dtype, None if args[4] is None else args[4].dtype, y.dtype))
        return y

    monkeypatch.setattr(_int8_plan, "int8_conv_op", note)
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, ran: list[Any]) -> None:
    model, x = made(name), image()
    fast = optimized(model, x)
    assert list(gives(fast).values()).count("uint8") == CONNECTED[name]
    assert "uint8" in str(pbm.report(fast))
    ran.clear()
    with torch.no_grad():
        y, exact = run(fast, x), run(model, x)
        assert type(y) is Tensor and difference(y, exact)[0] < 2.5e-2
    assert sum(out == torch.uint8 for _, _, out in ran) == CONNECTED[name]
    taken = sum((of_x == torch.uint8) for of_x, _, _ in ran)
    added = sum((residual == torch.uint8) for _, residual, _ in ran)
    assert taken >= CONNECTED[name] - 2 and added >= 1
    assert all(of is None or of == torch.uint8 for _, of, _ in ran)


def test_a_result_in_bytes_is_that_of_the_floats() -> None:
    """Half a step apart, and the next layer's integers are the very ones of its own scale."""
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
    x = image()
    fast = optimized(model, x)
    first, second = fast[0], fast[2]
    assert gives(fast) == {"0": "uint8", "2": None}
    assert first._output_of == (False, False, 1)
    with torch.no_grad():
        given = convolved(x, (first, fast[1]))
        floats = F.relu(first(x))
        assert type(given) is Bytes
        assert (given.as_floats() - floats).abs().max() <= first.output_scale * 0.5001
        from_bytes = convolved(convolved(x, (first, fast[1])), (second,))
        torch.testing.assert_close(fast(x), from_bytes, rtol=0, atol=0)
        second.input_scale, second.input_zero_point = first.output_scale, first.output_zero_point
        torch.testing.assert_close(second(floats), from_bytes, rtol=1e-5, atol=1e-5)


class Block(nn.Module):
    """Two convolutions, and something else with what the first gives."""

    def __init__(self, after: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.second, self.act, self.after = nn.Conv2d(16, 16, 1), nn.ReLU(), after

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        y = self.norm(y)
        y = self.act(y)
        z = self.second(y)
        z = self.act(z)
        return self.after(y, z)


def block(after: Callable[[Any, Tensor], Any]) -> Block:
    torch.manual_seed(0)
    return Block(after).eval()


@dataclass
class Output:
    z: Tensor
    hidden: list[Any]


FOREIGN: dict[str, Callable[[Any, Tensor], Any]] = {
    "sum": lambda y, z: z + y.mean(),
    "output": lambda y, z: {"z": z, "hidden": (y,)},
    "dataclass": lambda y, z: Output(z, [y]),
    "method": lambda y, z: z * y.sigmoid(),
    "in place": lambda y, z: y.add_(z),
    "numpy": lambda y, z: z + torch.from_numpy(y.numpy()),
    "pooling": lambda y, z: (z, F.max_pool2d(y, 2)),
    "float layer": lambda y, z: z + F.conv2d(y, torch.ones(16, 16, 1, 1)),
    "item": lambda y, z: z * (2.0 if float(y.max()) > 0 else 1.0),
}


def leaves(value: Any) -> list[Tensor]:
    if isinstance(value, Output):
        value = [value.z, *value.hidden]
    found: list[Tensor] = torch.utils._pytree.tree_leaves(value)
    return found


@pytest.mark.parametrize("case", FOREIGN)
def test_what_others_take_stays_floating(case: str) -> None:
    model, x = block(FOREIGN[case]), image()
    fast = optimized(model, x)
    assert gives(fast) == {"first": None, "second": None}
    with torch.no_grad():
        for y, y0 in zip(leaves(fast(x)), leaves(model(x)), strict=True):
            assert type(y) is Tensor and difference(y, y0)[0] < 3e-2


class Pooled(nn.Module):
    """Two convolutions with a pooling between."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.first, self.act, self.pool = nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), pool
        self.second = nn.Conv2d(16, 16, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = self.act(y)
        y = self.pool(y)
        return self.second(y)


# Whether bytes go through.
POOLS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "max": (lambda: nn.MaxPool2d(3, 2, 1), True),
    "max, ceil": (lambda: nn.MaxPool2d(2, ceil_mode=True), True),
    "max, dilation": (lambda: nn.MaxPool2d(3, dilation=2), False),
    "mean": (lambda: nn.AvgPool2d(2), False),
    "all": (lambda: nn.AdaptiveAvgPool2d(3), False),
}


@pytest.mark.parametrize("case", POOLS)
def test_bytes_go_through_a_max_pooling(case: str, ran: list[Any]) -> None:
    make, through = POOLS[case]
    torch.manual_seed(0)
    model, x = Pooled(make()).eval(), image()
    fast = optimized(model, x)
    assert gives(fast) == {"first": "uint8" if through else None, "pool": None, "second": None}
    ran.clear()
    with torch.no_grad():
        assert difference(fast(x), model(x))[0] < 3e-2
        assert ran[0][2] == (torch.uint8 if through else torch.float32)
        assert ran[1][0] == ran[0][2]
        if through:  # the same codes as from the floats of the first
            given = convolved(x, (fast.first, fast.act))
            assert type(given) is Bytes and type(fast.pool(given)) is Bytes
            exact = model.pool(given.as_floats())
            again = convolved(x, (fast.first, fast.act))
            assert torch.equal(fast.pool(again).as_floats(), exact)
            assert torch.equal(fast.pool(given), exact)  # floats from then on


def test_a_pooling_that_others_see_too_gets_floats() -> None:
    torch.manual_seed(0)
    model, x = Pooled(nn.MaxPool2d(2)).eval(), image()
    for pool in (nn.Sequential(nn.MaxPool2d(2), nn.Tanh()), nn.Sequential(nn.MaxPool2d(2))):
        model.pool = pool
        fast = optimized(model, x)
        assert gives(fast)["first"] == ("uint8" if len(pool) == 1 else None)
        with torch.no_grad():
            assert difference(fast(x), model(x))[0] < 3e-2
            pbm.restore(fast.pool)  # torch's, that knows no bytes
            assert difference(fast(x), model(x))[0] < 3e-2


def test_what_says_nothing_of_the_values_may_be_asked() -> None:
    def after(y: Tensor, z: Tensor) -> Tensor:
        assert y.shape == z.shape and y.size(1) == 16 and y.dim() == 4 and len(y) == 2
        assert y.dtype == torch.float32 and y.device == z.device and not y.requires_grad
        return z

    model, x = block(after), image()
    fast = optimized(model, x)
    assert gives(fast) == {"first": "uint8", "second": None}
    with torch.no_grad():
        assert difference(fast(x), model(x))[0] < 3e-2


@pytest.mark.parametrize("case", FOREIGN)
def test_others_that_come_later_get_floats(case: str) -> None:
    """A model whose forward decides otherwise than on example_inputs is slower, not wrong."""
    later: list[Any] = []
    model, x = block(lambda y, z: later[0](y, z) if later else z), image()
    fast = optimized(model, x)
    assert gives(fast) == {"first": "uint8", "second": None}
    later.append(FOREIGN[case])
    with torch.no_grad():
        for y, y0 in zip(leaves(fast(x)), leaves(model(x)), strict=True):
            assert difference(y + 0.0, y0)[0] < 3e-2


def test_changes_in_place_are_seen() -> None:
    given = Bytes.of(torch.full((1, 16, 2, 2), 7, dtype=torch.uint8), (0.5, 3))
    assert given.dtype == torch.float32 and given.shape == (1, 16, 2, 2)
    assert given.taken()[1] == (0.5, 3)
    F.relu(given.sub_(3.0), inplace=True)
    assert torch.equal(given + 0, torch.zeros(1, 16, 2, 2))
    assert given.taken()[1] == (0.0, 0) and torch.equal(given.taken()[0], torch.zeros(1, 16, 2, 2))
    plain = copy.deepcopy(given), pickle.loads(pickle.dumps(given))
    assert all(type(one) is Tensor and one.dtype == torch.float32 for one in plain)


def test_exchanged_parts_and_hooks() -> None:
    model, x = made("resnet"), image()
    fast = optimized(model, x)
    with torch.no_grad():
        exact = run(model, x)
        layers = [m for m in fast.modules() if isinstance(m, pbm.nn.Int8Conv2d)]
        for layer in (layers[2], layers[-3]):
            hook = layer.register_forward_hook(lambda m, args, y: y.clone())
            assert difference(run(fast, x), exact)[0] < 2.5e-2
            hook.remove()
        seen = []
        hooks = [m.register_forward_pre_hook(lambda m, args: seen.append(m)) for m in layers]
        assert difference(run(fast, x), exact)[0] < 2.5e-2
        assert len(seen) == len(layers)
        for hook in hooks:
            hook.remove()
        pbm.restore(layers[4])  # one of them becomes torch's again
        assert difference(run(fast, x), exact)[0] < 2.5e-2


def test_another_activation_has_another_range() -> None:
    fast, x = optimized(block(lambda y, z: z), image()), image()
    first, norm, act = fast.first, fast.norm, fast.act
    residual = torch.zeros(2, 16, 33, 33)
    with torch.no_grad():
        assert type(convolved(x, (first, norm, act))) is Bytes
        for other in ((first, norm, nn.SiLU()), (first, act), (first, norm), (first,)):
            assert type(convolved(x, other)) is Tensor
        assert type(convolved(x, (first, norm), residual, act)) is Tensor


def test_gradients_and_compilation_take_floats() -> None:
    model, x = block(lambda y, z: z), image()
    fast = optimized(model, x)
    torch._dynamo.reset()
    with torch.no_grad():
        exact = model(x)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert difference(compiled(x), exact)[0] < 3e-2
        exported = torch.export.export(fast, (x,)).module()
        assert difference(exported(x), exact)[0] < 3e-2
    torch._dynamo.reset()
    assert difference(fast(x), exact)[0] < 3e-2  # the norm's parameters want gradients
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert difference(fast(x).float(), exact)[0] < 3e-2
    with torch.no_grad():
        half = fast.bfloat16()(x.bfloat16())
        assert half.dtype == torch.bfloat16 and difference(half.float(), exact)[0] < 3e-2


def test_a_model_that_does_not_bear_it(caplog: pytest.LogCaptureFixture) -> None:
    def after(y: Any, z: Tensor) -> Tensor:
        if type(y) is not Tensor:
            raise TypeError("only plain tensors here")
        return z

    model, x = block(after), image()
    fast = optimized(model, x)
    assert "int8 convolutions pass floats on, since: only plain tensors here" in caplog.text
    assert gives(fast) == {"first": None, "second": None}
    with torch.no_grad():
        assert difference(fast(x), model(x))[0] < 3e-2


def test_bfloat16_models_stay_floating(ran: list[Any]) -> None:
    model, x = block(lambda y, z: z).bfloat16(), image().bfloat16()
    fast = optimized(model, x)
    assert gives(fast) == {"first": None, "second": None}


def test_checkpoints_know_it() -> None:
    model, x = made("resnet"), image()
    fast = optimized(model, x)
    fresh = pbm.optimize(made("resnet"), "int8", keep_original=False)
    fresh.load_state_dict(fast.state_dict())
    bare = optimized(made("resnet"), x)
    bare.load_state_dict(pbm.optimize(made("resnet"), "int8").state_dict())
    with torch.no_grad():
        assert torch.equal(run(fresh, x), run(fast, x))
        assert torch.equal(run(bare, x), run(pbm.optimize(made("resnet"), "int8"), x))
        for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
            assert torch.equal(run(other, x), run(fast, x))


def test_without_example_inputs_floats_flow(ran: list[Any]) -> None:
    fast, x = pbm.optimize(made("resnet"), "int8"), image()
    with torch.no_grad():
        run(fast, x)
    assert {out for _, _, out in ran} == {torch.float32}


# --- calibrate ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_calibration_on_more_inputs_is_that_on_all(name: str) -> None:
    """Ranges of several batches are those of one that holds them all; results do not clip."""
    model, x, more = made(name), image(), 3 * image(3).flip(0)
    fast, whole = optimized(model, x), optimized(model, torch.cat([x, more]))
    with torch.no_grad():
        exact, clipped = run(model, more), difference(run(fast, more), run(model, more))[0]
        pbm.calibrate(fast, [more[:1], (more[1:],)])
        assert difference(run(fast, more), exact)[0] < min(3e-2, clipped)
    pairs = zip(fast.modules(), whole.modules(), strict=True)
    layers = [(a, b) for a, b in pairs if isinstance(a, pbm.nn.Int8Conv2d)]
    assert len(layers) == MODELS[name][1]
    for a, b in layers:
        assert a.input_scale == pytest.approx(b.input_scale, rel=0.1)
        assert (a.output_scale is None) == (b.output_scale is None)
        if a.output_scale is not None:
            assert a.output_scale == pytest.approx(b.output_scale, rel=0.1)
            assert a._output_of == b._output_of


def test_calibration_makes_ranges_static() -> None:
    model, x = block(lambda y, z: z), image()
    fast = pbm.optimize(model, "int8")
    pbm.calibrate(fast, [x])
    low, high = float(x.min()), float(x.max())
    assert fast.first.input_scale == pytest.approx((high - low) / 255)
    assert fast.first.output_scale is None and fast.second.input_scale is not None
    before = copy.deepcopy(fast.state_dict())
    pbm.calibrate(fast, [x / 2])  # within what is known
    torch.testing.assert_close(fast.state_dict(), before, equal_nan=True)


def test_calibration_leaves_a_model_as_it_was_where_it_fails() -> None:
    model, x = block(lambda y, z: z), image()
    fast = optimized(model, x)
    before = copy.deepcopy(fast.state_dict())
    with pytest.raises(TypeError, match="example_inputs must be a tensor, a tuple"):
        pbm.calibrate(fast, [3])
    with pytest.raises(ValueError, match="input must be finite"):
        pbm.calibrate(fast, [x / 0])
    torch.testing.assert_close(fast.state_dict(), before, rtol=0, atol=0, equal_nan=True)
    assert not any("_recorder" in vars(m) for m in fast.modules())
    with pytest.raises(ValueError, match="calibrate: model must have int8 convolutions, got none"):
        pbm.calibrate(model, [x])


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # no batching rules: torch loops
def test_under_transforms_they_are_floats() -> None:
    """torch.func's wrappers do not ask a tensor's class, and would show the codes."""
    model = nn.Sequential(nn.Sequential(nn.Conv2d(16, 32, 3), nn.ReLU()), nn.Conv2d(32, 32, 3))
    x = torch.randn(2, 16, 9, 9)
    fast = optimized(model.eval(), x)
    assert list(gives(fast).values()) == ["uint8", None]
    with torch.no_grad():
        assert type(fast[0](x)) is Bytes
        between = torch.func.vmap(lambda x: fast[0](x).amax())(x[None])
        assert difference(between, model[0](x).amax()[None])[0] < 0.05
        assert difference(torch.func.vmap(fast)(x[None])[0], model(x))[0] < 0.05


def test_a_pooling_of_images_behind_convolutions_of_lines() -> None:
    """To a pooling of images (N, C, L) is an image without a batch, in bytes as in floats."""
    layers = (nn.Conv1d(16, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv1d(16, 32, 3))
    model, x = nn.Sequential(*layers).eval(), torch.randn(2, 16, 34)
    fast = optimized(model, x)
    assert gives(fast)["0"] == "uint8"
    with torch.no_grad():
        assert difference(fast(x), model(x))[0] < 0.05
