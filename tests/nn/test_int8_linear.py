"""pybigmodel.nn.Int8Linear: checkpoints, casts, copies; what it computes with is what it holds."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys

import pytest
import torch
from torch import nn

import pybigmodel as pbm
from pybigmodel._measure import difference
from pybigmodel.ops._checks import MAX_INT8_K
from pybigmodel.reference.linear import int8_linear


def float_layer(n: int = 24, k: int = 40, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(k, n, bias)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("shape", [(24, 40), (17, 31), (16, 4), (1, 1)])
def test_dynamic_is_the_reference(shape: tuple[int, int], symmetric: bool) -> None:
    theirs = float_layer(*shape)
    ours = pbm.nn.Int8Linear.from_linear(theirs, symmetric=symmetric)
    weight, scale = pbm.ops.quantize_weight(theirs.weight)
    assert torch.equal(ours.weight, weight)
    assert torch.equal(ours.weight_scale, scale)
    x = torch.randn(2, 3, shape[1])
    expected = int8_linear(x, weight, scale, theirs.bias, symmetric=symmetric)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), expected.float())


def test_weight_only_is_nearly_the_float_product() -> None:
    theirs = float_layer()
    ours = pbm.nn.Int8Linear.from_linear(theirs, weight_only=True)
    x = torch.randn(5, 40)
    with torch.no_grad():
        expected = nn.functional.linear(x, ours.dequantized_weight(), theirs.bias)
        assert difference(ours(x), expected)[0] < 1e-6
        assert difference(ours(x), theirs(x))[0] < 1e-2


@pytest.mark.parametrize("bias", [False, True])
def test_state_dict(bias: bool) -> None:
    ours = pbm.nn.Int8Linear.from_linear(float_layer(bias=bias))
    state = ours.state_dict()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
        "weight_int8": (torch.int8, (24, 40)),
        "weight_scale": (torch.float32, (24,)),
    } | ({"bias": (torch.float32, (24,))} if bias else {})
    assert list(ours.parameters()) == []
    for tensor in state.values():  # safetensors refuses parts of larger storages
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    x = torch.randn(5, 40)
    for assign in (False, True):
        for device in ("cpu", "meta"):
            if device == "meta" and not assign:
                continue
            fresh = nn.Sequential(pbm.nn.Int8Linear(40, 24, bias, device=device))
            prefixed = {f"0.{name}": t for name, t in state.items()}
            assert fresh.load_state_dict(prefixed, assign=assign).missing_keys == []
            assert torch.equal(fresh(x), ours(x))


def test_state_dict_in_a_fresh_process(tmp_path) -> None:
    ours = nn.Sequential(pbm.nn.Int8Linear.from_linear(float_layer()))
    x = torch.randn(5, 40)
    torch.save({"state": ours.state_dict(), "x": x, "y": ours(x)}, tmp_path / "checkpoint.pt")
    code = (
        "import sys, torch, pybigmodel as pbm\n"
        "saved = torch.load(sys.argv[1], weights_only=True)\n"
        "model = torch.nn.Sequential(pbm.nn.Int8Linear(40, 24))\n"
        "model.load_state_dict(saved['state'])\n"
        "assert torch.equal(model(saved['x']), saved['y'])\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "checkpoint.pt"], check=True)


def test_loading_names_what_is_wrong() -> None:
    ours = pbm.nn.Int8Linear(40, 24)
    with pytest.raises(RuntimeError, match=r"weight_int8 must be in .*, got weight, a float layer"):
        ours.load_state_dict(float_layer().state_dict(), strict=False)
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_scale"'):
        ours.load_state_dict(float_layer().state_dict())
    state = pbm.nn.Int8Linear.from_linear(float_layer()).state_dict()
    wrong = {**state, "weight_int8": state["weight_int8"].float()}
    with pytest.raises(RuntimeError, match=r"must be int8 of shape \(24, 40\), got .*float"):
        ours.load_state_dict(wrong)
    del state["weight_int8"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"weight_int8"'):
        ours.load_state_dict(state)
    ours.load_state_dict(state, strict=False)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*packed_weight"):
        ours.load_state_dict({"packed_weight": torch.zeros(1)})


def test_without_weights_the_output_is_nan() -> None:
    assert pbm.nn.Int8Linear(40, 24)(torch.randn(2, 40)).isnan().all()


def test_a_load_is_seen_by_the_next_call() -> None:
    ours, other = (pbm.nn.Int8Linear.from_linear(nn.Linear(40, 24)) for _ in range(2))
    x = torch.randn(5, 40)
    ours(x)
    ours.load_state_dict(other.state_dict())
    assert torch.equal(ours(x), other(x))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies(copied) -> None:
    ours = pbm.nn.Int8Linear.from_linear(float_layer(), weight_only=True).eval()
    ours.register_forward_hook(_double)
    again = copied(ours)
    x = torch.randn(5, 40)
    assert torch.equal(again(x), ours(x))
    assert (again.weight_only, again.training) == (True, False)
    again.load_state_dict(pbm.nn.Int8Linear(40, 24).state_dict(), assign=True)
    assert again(x).isnan().all()
    assert not ours(x).isnan().any()


def _double(module, args, output):
    return 2 * output


def test_a_pickle_holds_no_packed_layout() -> None:
    ours = pbm.nn.Int8Linear.from_linear(float_layer(17, 1001))  # packed: 32 × 1008
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    assert buffer.tell() < 17 * 1001 + 8000


@pytest.mark.parametrize("cast", [nn.Module.to, nn.Module.type])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_leave_weight_and_scales(dtype: torch.dtype, cast) -> None:
    theirs = float_layer()
    ours = pbm.nn.Int8Linear.from_linear(theirs)
    scale = ours.weight_scale.clone()
    weight = ours.weight
    cast(nn.Sequential(ours), dtype)
    assert torch.equal(ours.weight_scale, scale) and ours.weight_scale.dtype == torch.float32
    assert torch.equal(ours.weight, weight)
    assert ours.bias.dtype == dtype
    x = torch.randn(5, 40)
    y = ours(x.to(dtype))
    assert y.dtype == dtype
    assert difference(y.float(), theirs(x))[0] < 2e-2


def test_share_memory_and_to_empty() -> None:
    ours = pbm.nn.Int8Linear.from_linear(float_layer())
    x = torch.randn(5, 40)
    expected = ours(x)
    ours.share_memory()
    assert ours.packed_weight.is_shared()
    assert torch.equal(ours(x), expected)
    empty = pbm.nn.Int8Linear(40, 24, device="meta").to_empty(device="cpu")
    empty.load_state_dict(ours.state_dict())
    assert torch.equal(empty(x), expected)
    assert pbm.nn.Int8Linear(40, 24, device="meta")(torch.empty(3, 40, device="meta")).shape == (
        3,
        24,
    )


def test_output_is_usable_under_autograd_but_has_no_gradient() -> None:
    ours = pbm.nn.Int8Linear.from_linear(float_layer())
    x = torch.randn(5, 40, requires_grad=True)
    y = ours(x)
    with torch.no_grad():
        assert torch.equal(y, ours(x))
    with pytest.raises(RuntimeError, match="Int8Linear is for inference: a gradient through it"):
        y.sum().backward()
    assert not ours(x.detach()).requires_grad
    ours(x).detach().sum()


def test_output_may_be_changed_in_place_and_keeps_no_input() -> None:
    ours = pbm.nn.Int8Linear.from_linear(float_layer())
    model = nn.Sequential(nn.Embedding(7, 40), ours, nn.ReLU(inplace=True))
    assert model(torch.tensor([1, 2])).min() == 0
    x = torch.randn(5, 40, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda t: t):
        y = ours(x)
    assert saved == []
    y.add_(1)
    assert torch.equal(y, ours(x.detach()) + 1)


def test_bad_weights_are_named() -> None:
    theirs = float_layer()
    with torch.no_grad():
        theirs.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"weight has NaN or infinity in 1 of its rows.*row 3"):
        pbm.nn.Int8Linear.from_linear(theirs)
    with pytest.raises(ValueError, match=f"in_features must be at most {MAX_INT8_K}"):
        pbm.nn.Int8Linear(MAX_INT8_K + 1, 1)
    with pytest.raises(RuntimeError, match="input must be float32, bfloat16 or float16"):
        pbm.nn.Int8Linear(40, 24)(torch.zeros(3, 40, dtype=torch.int64))


def test_repr() -> None:
    layer = pbm.nn.Int8Linear(40, 24, bias=False, weight_only=True)
    assert repr(layer) == (
        "Int8Linear(in_features=40, out_features=24, bias=False, weight_only, symmetric=False)"
    )


@pytest.mark.parametrize("weight_only", [False, True])
@pytest.mark.parametrize("width", [37, 38, 40, 41])
def test_wrong_width(width: int, weight_only: bool) -> None:
    layer = pbm.nn.Int8Linear.from_linear(torch.nn.Linear(39, 8), weight_only=weight_only)
    with pytest.raises(RuntimeError, match=rf"in_features = 39, .*\(2, {width}\)"):
        layer(torch.ones(2, width))


def test_a_float_layer_does_not_take_its_integers() -> None:
    state = pbm.nn.Int8Linear.from_linear(torch.nn.Linear(8, 8)).state_dict()
    result = torch.nn.Linear(8, 8).load_state_dict(state, strict=False)
    assert result.missing_keys == ["weight"]
