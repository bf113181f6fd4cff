"""pybigmodel.nn's int8 convolutions: what they compute, checkpoints, casts, copies, gradients."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

import pybigmodel as pbm
from pybigmodel._measure import difference
from pybigmodel.ops._checks import MAX_INT8_K
from pybigmodel.reference.int8_conv import int8_conv

C, N = 16, 24
SIZES = {1: (23,), 2: (12, 13), 3: (6, 7, 5)}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "padded": {"padding": 1},
    "strided": {"stride": 2, "padding": 1},
    "dilated": {"dilation": 2, "padding": 2},
    "same": {"padding": "same"},
    "1×1": {"kernel_size": 1},
    "grouped": {"groups": 4, "padding": 1},
    "few channels": {"in_channels": 3, "padding": 1},
    "no bias": {"bias": False},
}
MODES = {
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "replicate": {"padding": 1, "padding_mode": "replicate", "stride": 2},
    "circular": {"padding": "same", "padding_mode": "circular"},
}


def pair(axes: int = 2, **options: Any) -> tuple[Any, Any]:
    """Our layer and the float one that it is made from."""
    torch.manual_seed(0)
    options = {"in_channels": C, "out_channels": N, "kernel_size": 3, **options}
    theirs = getattr(nn, f"Conv{axes}d")(**options)
    return getattr(pbm.nn, f"Int8Conv{axes}d").from_conv(theirs), theirs


def x(axes: int = 2, channels: int = C) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, channels, *SIZES[axes], generator=generator) + 0.3


def reference(ours: Any, input: Tensor) -> Tensor:
    around = ours._window[2::5], ours._window[3::5]
    return int8_conv(
        input,
        ours.weight,
        ours.weight_scale,
        ours.bias,
        stride=ours.stride,
        padding=list(zip(*around, strict=True)),
        dilation=ours.dilation,
        groups=ours.groups,
        input_scale=ours.input_scale,
        input_zero_point=ours.input_zero_point,
    ).to(input.dtype)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_forward_is_the_reference(axes: int, name: str, static: bool) -> None:
    ours, theirs = pair(axes, **OPTIONS[name])
    weight, scale = pbm.ops.quantize_weight(theirs.weight)
    assert torch.equal(ours.weight, weight)
    assert torch.equal(ours.weight_scale, scale)
    input = x(axes, theirs.in_channels)
    if static:
        ours.calibrate(input)
    with torch.no_grad():
        for one in (input, input[:, :, 1:], input.transpose(0, 1).contiguous().transpose(0, 1)):
            torch.testing.assert_close(ours(one), reference(ours, one))
        assert torch.equal(ours(input[0]), ours(input[:1])[0]) or not static
        assert ours(input[:0]).shape == theirs(input[:0]).shape
        assert difference(ours(input), theirs(input))[0] < 2e-2


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("axes", [1, 2, 3])
def test_padding_modes(axes: int, name: str) -> None:
    ours, theirs = pair(axes, **MODES[name])
    padded, mode = nn.functional.pad, MODES[name]["padding_mode"]
    input = x(axes)
    sides = theirs._reversed_padding_repeated_twice
    whole = padded(input, sides, mode=mode)
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(ours(input), reference(ours, whole))
            assert difference(ours(input), theirs(input))[0] < 2e-2
            ours.calibrate(input)
        assert ours(input.requires_grad_()).shape == theirs(input).shape


def test_norms_go_into_the_scales() -> None:
    """To the same integers; factors of either sign, and none."""
    ours, theirs = pair(bias=False)
    norm = nn.BatchNorm2d(N).eval()
    with torch.no_grad():
        norm.weight.normal_(), norm.bias.normal_()
        norm.weight[3] = 0.0
        norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2.0)
        folded = pbm.nn.Int8Conv2d.from_conv(theirs, norm)
        assert torch.equal(folded.weight, ours.weight)
        input = x()
        torch.testing.assert_close(folded(input), norm(ours(input)), rtol=1e-5, atol=1e-5)
        plain = pbm.nn.Int8Conv2d.from_conv(nn.Conv2d(C, N, 3), nn.BatchNorm2d(N, affine=False))
        assert plain.bias.dtype == torch.float32
    for bad in (nn.BatchNorm1d(N), nn.BatchNorm2d(C), nn.BatchNorm2d(N, track_running_stats=False)):
        with pytest.raises(ValueError, match="norm must be a BatchNorm with running statistics"):
            pbm.nn.Int8Conv2d.from_conv(theirs, bad)
    with pytest.raises(TypeError, match=r"convolution must be a torch.nn.Conv2d, got Linear"):
        pbm.nn.Int8Conv2d.from_conv(nn.Linear(2, 2))


def test_in_one_op_with_what_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, _ = pair(padding=1, bias=False)
    norm, residual = nn.BatchNorm2d(N).eval(), torch.randn(2, N, 12, 13)
    chain = pbm.nn.ConvBnAct2d(ours, norm, F.leaky_relu)
    with torch.no_grad():
        norm.running_var.uniform_(0.5, 2.0), norm.weight.uniform_(-1, 1)
        expected = F.leaky_relu(norm(ours(x())) + residual)
        calls = []
        monkeypatch.setattr(pbm.nn.Int8Conv2d, "forward", lambda *_: calls.append(1))
        for _ in range(2):
            torch.testing.assert_close(chain(x(), residual), expected, rtol=1e-5, atol=1e-5)
        assert not calls
        monkeypatch.undo()
        norm.running_mean.add_(1.0)  # is seen
        expected = F.leaky_relu(norm(ours(x())) + residual)
        torch.testing.assert_close(chain(x(), residual), expected, rtol=1e-5, atol=1e-5)
        ours.weight_scale.mul_(2.0)
        expected = F.leaky_relu(norm(ours(x())) + residual)
        torch.testing.assert_close(chain(x(), residual), expected, rtol=1e-5, atol=1e-5)
        ours.calibrate(x())
        expected = F.leaky_relu(norm(ours(x())) + residual)
        torch.testing.assert_close(chain(x(), residual), expected, rtol=1e-5, atol=1e-5)
        hook = ours.register_forward_hook(lambda m, args, y: torch.zeros_like(y))
        torch.testing.assert_close(
            chain(x(), residual), F.leaky_relu(norm(torch.zeros(2, N, 12, 13)) + residual)
        )
        hook.remove()
        half = chain.bfloat16()(x().bfloat16(), residual.bfloat16())
        assert half.dtype == torch.bfloat16 and difference(half.float(), expected)[0] < 2e-2


def test_calibration() -> None:
    ours, _ = pair()
    assert ours.input_scale is None
    input = x().clamp(-1.0, 2.0)
    input[0, 0, 0, :2] = torch.tensor([-1.0, 2.0])
    ours.calibrate(input)
    assert ours.input_scale == pytest.approx(3 / 255) and ours.input_zero_point == 85
    ours.calibrate(input / 2)  # within the range: it stays
    assert ours.input_scale == pytest.approx(3 / 255) and ours.input_zero_point == 85
    ours.calibrate(input.clamp(min=0.0) * 2)
    assert ours.input_scale == pytest.approx(5 / 255) and ours.input_zero_point == 51
    ours.calibrate(input[:0])
    ours.calibrate(torch.zeros(1, C, 3, 3))
    assert ours.input_scale == pytest.approx(5 / 255)
    with pytest.raises(ValueError, match="calibrate: input must be finite, got values in"):
        ours.calibrate(input.log())
    fresh, _ = pair()
    fresh.calibrate(torch.ones(1, C, 3, 3))  # zero is in the range
    assert fresh.input_scale == pytest.approx(1 / 255) and fresh.input_zero_point == 0
    fresh.input_scale = None
    torch.testing.assert_close(fresh(x()), reference(fresh, x()))


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_state_dict(bias: bool, static: bool) -> None:
    ours, _ = pair(bias=bias)
    if static:
        ours.calibrate(x())
    state = ours.state_dict()
    assert {name: (t.dtype, tuple(t.shape)) for name, t in state.items()} == {
        "weight_int8": (torch.int8, (N, C, 3, 3)),
        "weight_scale": (torch.float32, (N,)),
        "input_scale": (torch.float32, ()),
        "input_zero_point": (torch.int64, ()),
        "output_scale": (torch.float32, ()),
        "output_zero_point": (torch.int64, ()),
    } | ({"bias": (torch.float32, (N,))} if bias else {})
    assert list(ours.parameters()) == []
    for tensor in state.values():  # safetensors refuses parts of larger storages
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
    expected = ours(x())
    for assign, device in ((False, "cpu"), (True, "cpu"), (True, "meta")):
        fresh = nn.Sequential(pbm.nn.Int8Conv2d(C, N, 3, bias=bias, device=device))
        if device == "cpu":
            assert fresh(x()).isnan().all()
        prefixed = {f"0.{name}": t for name, t in state.items()}
        assert fresh.load_state_dict(prefixed, assign=assign).missing_keys == []
        assert torch.equal(fresh(x()), expected)


def test_state_dict_in_a_fresh_process(tmp_path) -> None:
    ours, _ = pair(padding=1)
    ours.calibrate(x())
    torch.save({"state": ours.state_dict(), "x": x(), "y": ours(x())}, tmp_path / "checkpoint.pt")
    code = (
        "import sys, torch, pybigmodel as pbm\n"
        "saved = torch.load(sys.argv[1], weights_only=True)\n"
        f"layer = pbm.nn.Int8Conv2d({C}, {N}, 3, padding=1)\n"
        "layer.load_state_dict(saved['state'])\n"
        "assert torch.equal(layer(saved['x']), saved['y'])\n"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "checkpoint.pt"], check=True)


def test_loading_names_what_is_wrong() -> None:
    ours, theirs = pair()
    state = ours.state_dict()
    with pytest.raises(RuntimeError, match=r"weight_int8 must be in .*from_conv quantises a float"):
        ours.load_state_dict(theirs.state_dict(), strict=False)
    for name in ("weight_int8", "weight_scale", "input_scale", "output_zero_point"):
        less = {key: value for key, value in state.items() if key != name}
        with pytest.raises(RuntimeError, match=rf'Missing key.*"{name}"'):
            ours.load_state_dict(less)
    for key, value, message in (
        ("weight_int8", state["weight_int8"].float(), r"must be int8 of shape \(24, 16, 3, 3\)"),
        ("weight_int8", state["weight_int8"][:8], r"got torch.int8 of shape \(8, 16, 3, 3\)"),
        ("input_scale", torch.tensor(-1.0), r"input_scale must be positive .* got -1.0 and 0"),
        ("output_scale", torch.tensor(torch.inf), r"output_scale must be positive .* got inf"),
        ("input_zero_point", torch.tensor(256), r"input_zero_point in \[0, 255\], got nan and 256"),
    ):
        with pytest.raises(RuntimeError, match=message):
            ours.load_state_dict({**state, key: value})
    result = theirs.load_state_dict(state, strict=False)
    assert result.missing_keys == ["weight"]


def test_a_load_is_seen_by_the_next_call() -> None:
    layers = [pbm.nn.Int8Conv2d.from_conv(nn.Conv2d(C, N, 3)) for _ in range(2)]
    norm, input = nn.BatchNorm2d(N).eval(), x()
    layers[1].calibrate(input)
    chains = [pbm.nn.ConvBnAct2d(layer, norm) for layer in layers]
    with torch.no_grad():
        assert not torch.equal(chains[0](input), chains[1](input))
        layers[0].load_state_dict(layers[1].state_dict())
        assert torch.equal(chains[0](input), chains[1](input))
        assert torch.equal(layers[0](input), layers[1](input))


@pytest.mark.parametrize(
    "copied", [copy.copy, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies(copied) -> None:
    ours, _ = pair(stride=2, groups=2)
    ours.calibrate(x())
    ours.register_forward_hook(_double)
    again = copied(ours.eval())
    assert torch.equal(again(x()), ours(x()))
    assert again.stride == (2, 2) and not again.training
    again.load_state_dict(pbm.nn.Int8Conv2d(C, N, 3, 2, groups=2).state_dict(), assign=True)
    assert again(x()).isnan().all()
    assert not ours(x()).isnan().any()


def _double(module, args, output):
    return 2 * output


def test_a_pickle_holds_no_packed_layout() -> None:
    ours = pbm.nn.Int8Conv2d.from_conv(nn.Conv2d(5, 17, 15))  # packed: 32 × 8 channels
    with torch.no_grad():
        pbm.nn.ConvBnAct2d(ours, nn.BatchNorm2d(17).eval())(torch.randn(1, 5, 16, 16))
    buffer = io.BytesIO()
    torch.save(ours, buffer)
    assert buffer.tell() < 17 * 5 * 225 + 9000


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_casts_leave_weight_and_scales(dtype: torch.dtype) -> None:
    ours, theirs = pair(padding=1)
    ours.calibrate(x())
    scale, weight = ours.weight_scale.clone(), ours.weight
    nn.Sequential(ours).to(dtype)
    assert torch.equal(ours.weight_scale, scale) and ours.weight_scale.dtype == torch.float32
    assert torch.equal(ours.weight, weight)
    assert ours.bias.dtype == dtype
    y = ours(x().to(dtype))
    assert y.dtype == dtype
    assert difference(y.float(), theirs(x()))[0] < 2e-2


def test_geometry_may_be_assigned() -> None:
    ours, theirs = pair()
    chain = pbm.nn.ConvBnAct2d(ours, nn.BatchNorm2d(N).eval(), F.relu)
    with torch.no_grad():
        chain(x())
        ours.padding, ours.stride = (1, 1), (2, 1)
        theirs.padding, theirs.stride = (1, 1), (2, 1)
        assert difference(ours(x()), theirs(x()))[0] < 2e-2
        torch.testing.assert_close(chain(x()), F.relu(chain.norm(ours(x()))))


@pytest.mark.parametrize("last", [False, True])
def test_the_layout_of_the_result_is_the_inputs(last: bool) -> None:
    ours, _ = pair()
    format = torch.channels_last if last else torch.contiguous_format
    y = ours(x().contiguous(memory_format=format))
    assert y.is_contiguous(memory_format=format)
    assert torch.equal(y, ours(x()))


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
def test_output_is_usable_under_autograd_but_has_no_gradient() -> None:
    ours, _ = pair(padding=1, padding_mode="reflect")
    input = x().requires_grad_()
    y = ours(input)
    with torch.no_grad():
        assert torch.equal(y, ours(input))
    with pytest.raises(RuntimeError, match="Int8Conv2d is for inference: a gradient through it"):
        y.sum().backward()
    assert not ours(x()).requires_grad
    with torch.no_grad(), forward_ad.dual_level():
        dual = forward_ad.make_dual(x(), torch.ones_like(x()))
        with pytest.raises(NotImplementedError, match=r"Int8Conv2d: input is a dual tensor"):
            ours(dual)


def test_under_autocast() -> None:
    ours, theirs = pair(padding=1)
    chain = pbm.nn.ConvBnAct2d(ours, nn.BatchNorm2d(N).eval(), F.relu)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        y = chain(x())
        assert y.dtype == torch.bfloat16
    with torch.no_grad():
        assert difference(y.float(), F.relu(chain.norm(theirs(x()))))[0] < 2e-2


@pytest.mark.parametrize("static", [False, True])
def test_compiled_and_exported(static: bool) -> None:
    torch._dynamo.reset()
    ours, _ = pair(padding=1)
    norm = nn.BatchNorm2d(N).eval()
    if static:
        ours.calibrate(x())
    model = nn.Sequential(ours, norm, nn.ReLU())
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for input in (x(), x().to(memory_format=torch.channels_last), x()[0]):
            input = input if input.dim() == 4 else input[None]
            torch.testing.assert_close(compiled(input), model(input))
        exported = torch.export.export(model, (x(),)).module()
        torch.testing.assert_close(exported(x()), model(x()))
        traced = torch.fx.symbolic_trace(model)
        assert torch.equal(traced(x()), model(x()))
    torch._dynamo.reset()


def test_what_it_does_not_take_is_named() -> None:
    ours, theirs = pair()
    with torch.no_grad():
        theirs.weight[3, 5] = torch.nan
    with pytest.raises(ValueError, match=r"weight has NaN or infinity in 1 of its rows.*row 3"):
        pbm.nn.Int8Conv2d.from_conv(theirs)
    with pytest.raises(ValueError, match=f"a filter must have at most {MAX_INT8_K} weights"):
        pbm.nn.Int8Conv1d(MAX_INT8_K + 1, 1, 1)
    for bad in (torch.zeros(2, C, 5, 5, dtype=torch.uint8), torch.zeros(2, C + 1, 5, 5)):
        with pytest.raises(RuntimeError, match=rf"Int8Conv2d: input must be .*\(N, {C}, spatial\)"):
            ours(bad)
    with pytest.raises(RuntimeError, match=r"got torch.float32 of shape \(16, 5\)"):
        ours(torch.zeros(C, 5))
    with pytest.raises(RuntimeError, match="Int8Conv2d does not compute in float64"):
        ours(x().double())


def test_repr() -> None:
    ours = pbm.nn.Int8Conv2d(C, N, 3, stride=2, bias=False)
    start = "Int8Conv2d(16, 24, kernel_size=(3, 3), stride=(2, 2), bias=False"
    assert repr(ours) == f"{start}, dynamic)"
    ours.calibrate(torch.ones(1, C, 3, 3))
    assert repr(ours) == f"{start}, input_scale=0.00392, input_zero_point=0)"
