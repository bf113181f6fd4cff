"""optimize and restore: the same results, nothing else changed, and all of it put back."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import pybigmodel as pbm
from pybigmodel._measure import difference
from pybigmodel.nn import _packing

PRECISIONS = ["fp32", "bf16", "int8"]
BOUND = {"fp32": 1e-6, "bf16": 1e-2, "int8": 3e-2}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_copy_computes_the_same_and_the_model_is_left_alone(model, x, precision) -> None:
    before = copy.deepcopy(model.state_dict())
    fast = pbm.optimize(model, precision)
    kind = pbm.nn.Int8Linear if precision == "int8" else pbm.nn.Linear
    assert [type(m) for m in (fast.first, fast.body[0], fast.body[2], fast.head)] == [kind] * 4
    assert type(model.first) is type(model.head) is nn.Linear
    with torch.no_grad():
        assert difference(fast(x), model(x))[0] < BOUND[precision]
        for parameter in fast.parameters():
            parameter.zero_()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_inplace_and_restore(model, x, precision) -> None:
    modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
    with torch.no_grad():
        expected = model(x)
    assert pbm.optimize(model, precision, inplace=True) is model
    assert dict(model.named_modules()) == modules  # the same objects
    with torch.no_grad():
        model(x)
    assert pbm.restore(model) is model
    assert {name: type(m) for name, m in model.named_modules()} == {
        name: nn.Linear if name in ("first", "body.0", "body.2", "head") else type(m)
        for name, m in modules.items()
    }
    assert dict(model.named_parameters()) == parameters
    assert all(p is parameters[name] for name, p in model.named_parameters())
    with torch.no_grad():
        assert torch.equal(model(x), expected)
    assert set(vars(model.first)) == set(vars(nn.Linear(1, 1)))
    with pytest.raises(ValueError, match="model was not optimized"):
        pbm.report(model)


def test_checkpoints_go_both_ways(model, x) -> None:
    fast = pbm.optimize(type(model)())
    assert list(fast.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        fast(x)
        fast.load_state_dict(model.state_dict())
        assert difference(fast(x), model(x))[0] < 1e-6
    model.load_state_dict(fast.state_dict())
    int8 = pbm.optimize(model, "int8")
    fresh = pbm.optimize(type(model)(), "int8")
    fresh.load_state_dict(int8.state_dict())
    assert torch.equal(fresh(x), int8(x))


def test_training_is_torchs(model, x) -> None:
    fast = pbm.optimize(model)
    for trained in (model, fast):
        optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-2)
        for _ in range(5):
            optimizer.zero_grad()
            trained(x).square().mean().backward()
            optimizer.step()
    with torch.no_grad():
        assert difference(fast(x), model(x))[0] < 1e-3
    restored = pbm.restore(fast)
    assert type(restored.head) is nn.Linear
    torch.testing.assert_close(restored.head.weight, model.head.weight, rtol=1e-2, atol=1e-4)


def test_restore_after_casts_gives_the_casts(model) -> None:
    weight = model.head.weight.detach().clone()
    fast = pbm.optimize(model, "int8").bfloat16()
    assert fast.head.weight_scale.dtype == torch.float32
    pbm.restore(fast)
    assert torch.equal(fast.head.weight, weight.bfloat16())
    assert fast.head.bias.dtype == torch.bfloat16


@pytest.mark.parametrize("lose", ["keep_original", "pickle"])
def test_restore_without_originals_gives_what_int8_computed_with(model, x, lose) -> None:
    fast = pbm.optimize(model, "int8", keep_original=lose != "keep_original")
    expected = fast.head.dequantized_weight()
    if lose == "pickle":
        fast = pickle.loads(pickle.dumps(fast))
    before, after = (sum(m.nbytes for m in fast.head.buffers()), fast.head.in_features)
    assert before < 16 * (after + 4) + 100
    with torch.no_grad():
        y = fast(x)
        pbm.restore(fast)
        assert isinstance(fast.head.weight, nn.Parameter) and fast.head.weight.requires_grad
        assert torch.equal(fast.head.weight, expected)
        assert difference(fast(x), y)[0] < BOUND["int8"]


def test_originals_are_out_of_reach(model) -> None:
    fast = pbm.optimize(model, "int8")
    assert list(fast.parameters()) == []
    assert set(fast.head.state_dict()) == {"weight_int8", "weight_scale", "bias"}
    assert list(fast.head.children()) == []
    again = copy.deepcopy(fast)
    pbm.restore(again)
    assert torch.equal(again.head.weight, model.head.weight)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_model_that_is_one_layer(precision) -> None:
    layer = nn.Linear(40, 10)
    fast = pbm.optimize(layer, precision)
    assert type(fast) is not nn.Linear and type(layer) is nn.Linear
    assert "(the model)" in str(pbm.report(fast))
    assert pbm.optimize(layer, precision, inplace=True) is layer
    assert type(pbm.restore(layer)) is nn.Linear


def test_restore_frees_the_packed_copies(model, x) -> None:
    fast = pbm.optimize(model)
    with torch.no_grad():
        fast(x)
    weights = [id(parameter) for parameter in fast.parameters()]
    assert any(weight in _packing._entries for weight in weights)
    pbm.restore(fast)
    assert not any(weight in _packing._entries for weight in weights)


@pytest.mark.parametrize("assign", [False, True])
def test_restore_after_loading_gives_what_was_loaded(model, x, assign) -> None:
    fast, other = pbm.optimize(type(model)(), "int8"), pbm.optimize(model, "int8")
    fast.load_state_dict(other.state_dict(), assign=assign)
    with torch.no_grad():
        y = fast(x)
    weight, bias = fast.head.dequantized_weight(), fast.head.bias.clone()
    pbm.restore(fast)
    assert torch.equal(fast.head.weight, weight) and torch.equal(fast.head.bias, bias)
    assert all(p.requires_grad for p in fast.parameters())
    with torch.no_grad():
        assert difference(fast(x), y)[0] < BOUND["int8"]


def test_restore_keeps_edits_of_the_bias(model) -> None:
    fast = pbm.optimize(model, "int8")
    fast.head.bias.add_(1)
    fast.first.bias = None
    pbm.restore(fast)
    assert torch.equal(fast.head.bias, model.head.bias + 1)
    assert fast.first.bias is None
    assert torch.equal(fast.head.weight, model.head.weight)


def test_copy_keeps_the_original(model) -> None:
    layer = pbm.optimize(model.head, "int8")
    assert torch.equal(pbm.restore(copy.copy(layer)).weight, model.head.weight)


def test_restore_refuses_layers_that_became_another_class(model) -> None:
    fast = pbm.optimize(model)
    nn.utils.parametrize.register_parametrization(fast.head, "weight", nn.Identity())
    with pytest.raises(RuntimeError, match=r"restore: head cannot be put back.*Parametrized"):
        pbm.restore(fast)
    assert type(fast.first) is pbm.nn.Linear  # nothing was
    nn.utils.parametrize.remove_parametrizations(fast.head, "weight")
    assert type(pbm.restore(fast).head) is nn.Linear


def test_another_precision_is_not_silently_the_first(model) -> None:
    fast = pbm.optimize(pbm.optimize(model), "int8", exclude="first")
    rows = {row.path: row for row in pbm.report(fast).rows}
    assert rows["head"].precision == "fp32" and rows["head"].replaced_by == "pybigmodel.nn.Linear"
    assert rows["head"].left == "in fp32 since an earlier call; pbm.restore it to have int8"
    assert rows["first"].left is None
    again = pbm.optimize(pbm.restore(fast), "int8")
    assert {row.precision for row in pbm.report(again).rows} == {"int8"}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("kind", ["Linear", "Int8Linear", "MultiheadAttention"])
def test_in_float64_the_layer_and_the_way_back_are_named(kind, grad) -> None:
    layer = nn.MultiheadAttention(8, 2) if kind == "MultiheadAttention" else nn.Linear(8, 8)
    layer = pbm.optimize(layer, "int8" if kind == "Int8Linear" else "fp32")
    x = torch.randn(3, 8).double()
    arguments = [x, x, x] if kind == "MultiheadAttention" else [x]
    with torch.set_grad_enabled(grad):
        message = rf"pybigmodel\.nn\.{kind} does not compute in float64; .*pbm\.restore"
        with pytest.raises(RuntimeError, match=message):
            layer.double()(*arguments)
        pbm.restore(layer).double()(*arguments)


# --- poolings -----------------------------------------------------------------------------------


class Pools(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.greatest = nn.Conv2d(3, 16, 3, padding=1), nn.MaxPool2d(3, 2, 1)
        self.mean, self.all = nn.AvgPool2d(2), nn.AdaptiveAvgPool2d(1)
        self.indices = nn.MaxPool2d(2, return_indices=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mean(self.greatest(self.first(x)))
        return self.all(self.indices(y)[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_poolings(precision: str) -> None:
    model, x = Pools().eval(), torch.randn(2, 3, 17, 17)
    fast = pbm.optimize(model, precision)
    rows = {row.path: row for row in pbm.report(fast)}
    assert rows["greatest"].replaced_by == "pybigmodel.nn.MaxPool2d"
    assert rows["mean"].replaced_by == "pybigmodel.nn.AvgPool2d"
    assert rows["all"].layer == "AdaptiveAvgPool2d(output_size=1)"
    assert rows["indices"].left == "gives indices, which torch's alone does"
    again = {row.path: row for row in pbm.report(pbm.optimize(fast, "bf16"))}
    assert again["all"] == rows["all"]
    with torch.no_grad():
        assert fast.greatest(fast.first(x)).is_contiguous(memory_format=torch.channels_last)
        torch.testing.assert_close(fast(x), model(x), rtol=5e-2, atol=5e-2)
        pbm.restore(fast)
        assert (
            type(fast.greatest) is nn.MaxPool2d
            and vars(fast.mean).keys() == vars(model.mean).keys()
        )
        torch.testing.assert_close(fast(x), model(x), rtol=1e-5, atol=1e-5)
    other = pbm.optimize(model, channels_last=False)
    assert other.greatest(x).is_contiguous()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dtype": torch.float64}, "the model is torch.float64"),
        ({"device": "meta"}, "on device meta, for which there is no pooling"),
    ],
)
def test_poolings_that_would_be_torchs(options, reason) -> None:
    fast = pbm.optimize(Pools().to(**options))
    rows = {row.path: row for row in pbm.report(fast)}
    assert rows["greatest"].left == rows["all"].left == reason
    assert type(fast.greatest) is nn.MaxPool2d


def test_poolings_that_turn_out_to_be_torchs(twice_as_fast) -> None:
    x = torch.randn(1, 8, 9, 9)
    row = pbm.report(pbm.optimize(nn.Sequential(nn.MaxPool2d(2)), example_inputs=x)).rows[0]
    assert row.left is None and row.kernel.startswith("pool.")
    x = x.double()
    row = pbm.report(pbm.optimize(nn.Sequential(nn.MaxPool2d(2)), example_inputs=x)).rows[0]
    assert row.left == "what it gets on example_inputs is for torch's alone" and row.kernel is None


@pytest.mark.parametrize(
    ("dtype", "error", "right"),
    [(torch.float32, 1e-3, False), (torch.bfloat16, 1e-3, True), (torch.bfloat16, 1e-1, False)],
)
def test_poolings_are_held_to_the_bound_of_what_they_get(
    dtype, error, right, twice_as_fast, monkeypatch
) -> None:
    pooled = pbm.nn.AvgPool2d._of_batch
    monkeypatch.setattr(pbm.nn.AvgPool2d, "_of_batch", lambda s, x: pooled(s, x) * (1 + error))
    x = torch.rand(1, 8, 8, 8, dtype=dtype)
    row = pbm.report(pbm.optimize(nn.Sequential(nn.AvgPool2d(2)), example_inputs=x)).rows[0]
    assert (row.left is None) == right
