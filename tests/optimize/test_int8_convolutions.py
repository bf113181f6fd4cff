"""optimize(model, "int8") on convolutions: which take part, what follows them, what comes back."""

from __future__ import annotations

import copy
import io
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from int8_models import MODELS, image, made, randomised, run
from torch import Tensor, nn

import pybigmodel as pbm
from pybigmodel import _measure
from pybigmodel._measure import difference

DEPTHWISE = "depthwise: bound by memory, not by products"


def ops_of(model: nn.Module, x: Tensor) -> Counter[str]:
    with torch.no_grad():
        model(x)  # packs
        with torch.profiler.profile() as profile:
            model(x)
    return Counter(event.name for event in profile.events())


def convolutions(model: nn.Module) -> list[Any]:
    return [row for row in pbm.report(model) if row.layer.startswith("Conv")]


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str, calibrated: bool, twice_as_fast: list[nn.Module]) -> None:
    model, x = made(name), image()
    fast = pbm.optimize(model, "int8", example_inputs=x if calibrated else None)
    _, in_int8, in_float = MODELS[name]
    rows = convolutions(fast)
    assert Counter(row.precision for row in rows) == Counter(int8=in_int8, fp32=in_float)
    assert {row.in_float for row in rows if row.precision == "fp32"} <= {DEPTHWISE}
    assert all((row.in_float is None) == (row.precision == "int8") for row in rows)
    assert all(row.norm is not None and row.left is None for row in rows)
    layers = [m for m in fast.modules() if isinstance(m, pbm.nn.Int8Conv2d)]
    assert len(layers) == in_int8
    assert all((layer.input_scale is not None) == calibrated for layer in layers)
    with torch.no_grad():
        exact = run(model, x)
        for _ in range(2):
            error, cosine = difference(run(fast, x), exact)
            assert error < 2.5e-2 and cosine > 0.9997  # an SNR of 32 dB
    ran = ops_of(fast, x)
    assert ran["pybigmodel::int8_conv"] == in_int8
    assert ran["pybigmodel::conv_packed"] == in_float
    assert not {"aten::batch_norm", "aten::relu", "aten::add_", "aten::conv2d"} & set(ran)


def test_ranges_are_those_of_the_example_inputs(twice_as_fast: list[nn.Module]) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 8, 1)), image()
    fast = pbm.optimize(model, "int8", example_inputs=x)
    between = torch.relu(model[0](x)).detach()
    for layer, input in ((fast[0], x), (fast[2], between)):
        low, high = float(input.min().clamp(max=0)), float(input.max())
        assert layer.input_scale == pytest.approx((high - low) / 255)
        assert layer.input_zero_point == round(-low / layer.input_scale)


def test_ranges_are_over_all_calls(twice_as_fast: list[nn.Module]) -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.conv(x) * 10)

    model, x = Twice(), image()
    fast = pbm.optimize(model, "int8", example_inputs=x)
    with torch.no_grad():
        second = model.conv(x) * 10
    low = min(float(x.min()), float(second.min()))
    high = max(float(x.max()), float(second.max()))
    assert fast.conv.input_scale == pytest.approx((high - low) / 255)


FLOATING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "depthwise": (lambda: nn.Conv2d(16, 16, 3, groups=16), DEPTHWISE),
    "two filters a channel": (lambda: nn.Conv2d(16, 32, 3, groups=16), DEPTHWISE),
    "small groups": (lambda: nn.Conv2d(16, 16, 3, groups=2), "its groups have 8 channels each"),
    "transposed": (lambda: nn.ConvTranspose2d(16, 16, 3), "transposed convolutions have no int8"),
    "long": (lambda: nn.Conv2d(16, 1, (65, 65)), "its filters have 67600 weights, above 65793"),
}


@pytest.mark.parametrize("case", FLOATING)
def test_convolutions_that_stay_in_float(case: str) -> None:
    make, reason = FLOATING[case]
    model = nn.Sequential(nn.Conv2d(3, 16, 1), make())
    fast = pbm.optimize(model, "int8")
    first, second = pbm.report(fast)
    assert (first.precision, first.in_float) == ("int8", None)
    assert second.precision == "fp32" and second.left is None
    assert second.replaced_by == f"pybigmodel.nn.{type(model[1]).__name__}"
    assert second.in_float.startswith(reason)
    assert reason in str(pbm.report(fast)) and "not in int8" in str(pbm.report(fast))
    again = pbm.optimize(fast, "int8")
    assert [row.left for row in pbm.report(again)] == [None, None]
    wide = pbm.optimize(nn.Sequential(nn.Conv2d(64, 64, 3, groups=2)), "int8")
    assert isinstance(wide[0], pbm.nn.Int8Conv2d)


def test_what_cannot_be_quantised_stays_in_float() -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1))
    model[2].weight = model[1].weight
    with torch.no_grad():
        model[0].weight[2] = torch.inf
    fast = pbm.optimize(model, "int8")
    reasons = [row.in_float for row in pbm.report(fast)]
    assert "NaN or infinity in 1 of its rows" in reasons[0]
    assert (
        reasons[1] == reasons[2] == ("tied (1.weight = 2.weight): an int8 copy would no longer be")
    )
    assert fast[1].weight is fast[2].weight


def test_slower_ones_are_floating(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where int8 is not faster the floating layer is tried, and then torch's stays."""

    def time_pair(original: Any, candidate: Any, arguments: Any) -> tuple[float, float]:
        slow = isinstance(candidate, pbm.nn.Int8Conv2d) and candidate.in_channels == 16
        return (1.0, 2.0) if slow or candidate.out_channels == 5 else (2.0, 1.0)

    monkeypatch.setattr(_measure, "time_pair", time_pair)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 5, 1))
    fast = pbm.optimize(model, "int8", example_inputs=image(), channels_last=False)
    first, second, third = pbm.report(fast)
    assert first.precision == "int8" and first.in_float is None
    assert (second.precision, second.speedup, second.left) == ("fp32", 2.0, None)
    assert second.in_float == "not faster on example_inputs: 0.50×"
    assert third.left == "not faster on example_inputs: 0.50×"
    assert [type(m) for m in fast] == [pbm.nn.Int8Conv2d, pbm.nn.Conv2d, nn.Conv2d]


@pytest.mark.parametrize("faster", [True, False])
def test_the_first_layer_is_in_what_is_faster(
    faster: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its input has to be quantised, which the floating layer spares itself."""
    timed = []

    def time_pair(original: Any, candidate: Any, arguments: Any) -> tuple[float, float]:
        timed.append(type(candidate))
        floating = isinstance(candidate, pbm.nn.Conv2d)
        return (3.0, 1.0) if floating == faster else (2.0, 1.0)

    monkeypatch.setattr(_measure, "time_pair", time_pair)
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1))
    fast = pbm.optimize(model, "int8", example_inputs=image(), channels_last=False)
    first, second = pbm.report(fast)
    assert timed == [pbm.nn.Int8Conv2d, pbm.nn.Int8Conv2d, pbm.nn.Conv2d]
    assert second.precision == "int8"
    if faster:
        assert first.in_float == "faster in floating point: 3.00× against 2.00×"
    assert (first.precision, first.speedup) == ("fp32" if faster else "int8", 3.0)


def test_those_that_do_not_bear_it_are_floating(twice_as_fast: list[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1))
    with torch.no_grad():
        model[1].weight[:, 0] *= 1e5  # one channel dwarfs the others, and its input is small
        model[0].weight[0] *= 1e-6
        model[0].bias[0] = 0.0
    fast = pbm.optimize(model, "int8", example_inputs=image())
    assert "its error on example_inputs is" in pbm.report(fast).rows[1].in_float
    assert isinstance(fast[1], pbm.nn.Conv2d)
    with torch.no_grad():
        assert difference(fast(image()), model(image()))[0] < 3e-2


def test_bad_inputs_are_not_calibrated_on(twice_as_fast: list[nn.Module]) -> None:
    model, x = nn.Sequential(nn.Conv2d(3, 16, 1)), image()
    x[0, 0, 0, 0] = torch.nan
    fast = pbm.optimize(model, "int8", example_inputs=x)
    (row,) = pbm.report(fast)
    assert "calibrate: input must be finite" in row.in_float
    assert row.precision == "fp32"


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_restore(name: str, keep: bool) -> None:
    model, x = made(name), image()
    fast = pbm.optimize(model, "int8", keep_original=keep)
    with torch.no_grad():
        expected, computed = run(model, x), run(fast, x)
        restored = pbm.restore(fast)
        if keep:
            assert torch.equal(run(restored, x), expected)
        else:
            assert difference(run(restored, x), computed)[0] < 3e-2
    assert [type(m) for m in restored.modules()] == [type(m) for m in model.modules()]
    assert [vars(m).keys() for m in restored.modules()] == [vars(m).keys() for m in model.modules()]
    assert list(restored.state_dict()) == list(model.state_dict())


def test_bytes() -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3))
    for keep in (True, False):
        (row,) = pbm.report(pbm.optimize(model, "int8", keep_original=keep))
        assert row.bytes_before == 32 * 16 * 9 * 4
        packed = 2 * (9 * 4 + 1) * 64 + 32 * 4
        assert row.bytes_after == packed + keep * row.bytes_before


@pytest.mark.parametrize("name", ["resnet", "mobilenet"])
def test_copies_pickles_and_checkpoints(name: str, twice_as_fast: list[nn.Module]) -> None:
    model, x = made(name), image()
    fast = pbm.optimize(model, "int8", example_inputs=x)
    file = io.BytesIO()
    torch.save(fast, file)
    file.seek(0)
    fresh = pbm.optimize(made(name), "int8", keep_original=False)
    fresh.load_state_dict(fast.state_dict())
    with torch.no_grad():
        expected = run(fast, x)
        for other in (
            copy.deepcopy(fast),
            pickle.loads(pickle.dumps(fast)),
            torch.load(file, weights_only=False),
            fresh,
        ):
            assert torch.equal(run(other, x), expected)
            assert ops_of(other, x)["pybigmodel::int8_conv"] == MODELS[name][1]
            pbm.restore(other)
            assert difference(run(other, x), run(model, x))[0] < 3e-2


def test_changed_statistics_are_seen() -> None:
    model, x = made("resnet"), image()
    fast = pbm.optimize(model, "int8")
    with torch.no_grad():
        run(fast, x)
        for one in (model, fast):
            torch.manual_seed(7)
            randomised(one)
        assert difference(run(fast, x), run(model, x))[0] < 3e-2


def test_hooks_have_the_parts_called_one_by_one() -> None:
    model, x = made("resnet"), image()
    fast, seen = pbm.optimize(model, "int8"), set()
    leaves = [m for m in fast.modules() if not list(m.children())]
    for leaf in leaves:
        leaf.register_forward_hook(lambda module, args, y: seen.add(module))
    with torch.no_grad():
        assert difference(run(fast, x), run(model, x))[0] < 3e-2
    assert {m for m in leaves if not isinstance(m, nn.Identity)} <= seen


def test_compiled_exported_and_under_gradients() -> None:
    model, x = made("resnet"), image()
    fast = pbm.optimize(model, "int8")
    torch._dynamo.reset()
    with torch.no_grad():
        expected = run(model, x)
        compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
        assert difference(run(compiled, x), expected)[0] < 3e-2
        exported = torch.export.export(fast, (x,)).module()
        assert difference(run(exported, x), expected)[0] < 3e-2
    torch._dynamo.reset()
    y = run(fast, x)  # parameters of norms want gradients
    with pytest.raises(RuntimeError, match=r"Int8.* is for inference: a gradient through it"):
        y.sum().backward()


def test_precisions_of_earlier_calls() -> None:
    fast = pbm.optimize(made("resnet"), "fp32")
    again = pbm.optimize(fast, "int8")
    assert {row.left for row in convolutions(again)} == {
        "in fp32 since an earlier call; pbm.restore it to have int8"
    }
    int8 = pbm.optimize(made("resnet"), "int8")
    assert {row.left for row in convolutions(pbm.optimize(int8, "int8"))} == {None}
    rows = convolutions(pbm.optimize(int8, "fp32"))
    assert {row.left for row in rows} == {
        "in int8 since an earlier call; pbm.restore it to have fp32"
    }
    both = pbm.optimize(made("mobilenet"), "int8")
    lefts = Counter(row.left for row in convolutions(pbm.optimize(both, "bf16")))
    assert lefts == {
        "in int8 since an earlier call; pbm.restore it to have bf16": 35,
        "in fp32 since an earlier call; pbm.restore it to have bf16": 17,
    }


def test_bf16_models() -> None:
    model, x = made("resnet"), image()
    with torch.no_grad():
        exact = run(model, x)
        fast = pbm.optimize(model.bfloat16(), "int8")
        y = run(fast, x.bfloat16())
    assert y.dtype == torch.bfloat16 and difference(y.float(), exact)[0] < 4e-2


@pytest.mark.parametrize("axes", [1, 3])
def test_other_axes(axes: int) -> None:
    conv, norm = getattr(nn, f"Conv{axes}d"), getattr(nn, f"BatchNorm{axes}d")
    model = nn.Sequential(conv(3, 16, 3), norm(16), nn.ReLU(), conv(16, 8, 1)).eval()
    x = torch.randn(2, 3, *(9, 8, 7)[:axes])
    fast = pbm.optimize(model, "int8")
    assert [row.replaced_by for row in pbm.report(fast)] == [f"pybigmodel.nn.Int8Conv{axes}d"] * 2
    with torch.no_grad():
        assert difference(fast(x), model(x))[0] < 3e-2
    assert ops_of(fast, x)["pybigmodel::int8_conv"] == 2
