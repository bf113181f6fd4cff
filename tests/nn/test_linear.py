"""pybigmodel.nn.Linear: torch.nn.Linear's behaviour."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrizations, prune
from torch.utils.flop_counter import FlopCounterMode

import pybigmodel as pbm
from pybigmodel._measure import difference
from pybigmodel.nn import _packing

K, N = 40, 24


def pair(bias: bool = True, dtype: torch.dtype = torch.float32) -> tuple[pbm.nn.Linear, nn.Linear]:
    """Our layer and torch's, with weights of their own that are equal."""
    torch.manual_seed(0)
    theirs = nn.Linear(K, N, bias, dtype=dtype)
    return pbm.nn.Linear.from_linear(copy.deepcopy(theirs)), theirs


def x(rows: int = 5, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, K, generator=generator).to(dtype)


def assert_like(got: torch.Tensor, expected: torch.Tensor, bound: float = 1e-6) -> None:
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    error, _ = difference(got, expected)
    assert error < bound


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(K,), (1, K), (5, K), (2, 3, K), (0, K), (2, 0, K)])
def test_forward_is_torchs(bias: bool, shape: tuple[int, ...]) -> None:
    ours, theirs = pair(bias)
    input = torch.randn(shape)
    with torch.no_grad():
        got, expected = ours(input), theirs(input)
    torch.testing.assert_close(got, expected)


def test_constructor_and_state_dict_are_torchs() -> None:
    torch.manual_seed(3)
    ours = pbm.nn.Linear(K, N)
    torch.manual_seed(3)
    theirs = nn.Linear(K, N)
    assert isinstance(ours, nn.Linear)
    assert list(ours.state_dict()) == list(theirs.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)
    with torch.no_grad():
        ours(x())
    assert list(ours.state_dict()) == ["weight", "bias"]
    assert list(dict(ours.named_buffers())) == []
    assert repr(ours) == "Linear(in_features=40, out_features=24, bias=True, precision='fp32')"


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict_goes_both_ways(assign: bool) -> None:
    ours, _ = pair()
    other = nn.Linear(K, N)
    with torch.no_grad():
        ours(x())
        ours.load_state_dict(other.state_dict(), assign=assign)
        assert_like(ours(x()), other(x()))
        fresh = nn.Linear(K, N)
        fresh.load_state_dict(ours.state_dict(), assign=assign)
        assert_like(ours(x()), fresh(x()))


def test_precision_may_be_changed() -> None:
    ours, theirs = pair()
    with torch.no_grad():
        expected = theirs(x())
        exact = ours(x())
        ours.precision = "bf16"
        rounded = ours(x())
        assert 1e-4 < difference(rounded, expected)[0] < 1e-2
        assert rounded.dtype == torch.float32
        ours.precision = "fp32"
        assert torch.equal(ours(x()), exact)
    ours.precision = "bf16"
    trained = ours(x())
    assert 1e-4 < difference(trained, expected)[0] < 1e-2
    with pytest.raises(ValueError, match="precision must be 'fp32' or 'bf16'; got 'int8'"):
        ours.precision = "int8"
    with pytest.raises(ValueError, match="precision must be"):
        pbm.nn.Linear(K, N, precision="fp8")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    ours, theirs = pair(dtype=dtype)
    with torch.no_grad():
        assert_like(ours(x(dtype=dtype)), theirs(x(dtype=dtype)), 1e-2)
    assert_like(ours(x(dtype=dtype)), theirs(x(dtype=dtype)), 1e-2)


@pytest.mark.parametrize("cast", ["half", "bfloat16"])
def test_casts(cast: str) -> None:
    ours, theirs = pair()
    with torch.no_grad():
        ours(x())
        getattr(ours, cast)(), getattr(theirs, cast)()
        assert_like(ours(x(dtype=ours.weight.dtype)), theirs(x(dtype=theirs.weight.dtype)), 1e-2)


@pytest.mark.parametrize("grad", [True, False])
def test_mismatched_dtype_is_an_error_in_both_modes(grad: bool) -> None:
    ours, _ = pair()
    with torch.set_grad_enabled(grad):
        ours(x())
        with pytest.raises(RuntimeError, match="weight must be bfloat16, got float32"):
            ours(x(dtype=torch.bfloat16))
        with pytest.raises(RuntimeError, match=r"in_features = 4[01]"):
            ours(torch.randn(3, K + 1))


def test_gradients_are_torchs() -> None:
    ours, theirs = pair()
    inputs = [x().requires_grad_(), x().requires_grad_()]
    for layer, input in zip((ours, theirs), inputs, strict=True):
        layer(input).square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad)


def test_frozen_weights_are_packed_under_grad_mode_and_pass_gradients_on() -> None:
    ours, theirs = pair()
    ours.requires_grad_(False), theirs.requires_grad_(False)
    assert_like(ours(x()), theirs(x()))
    assert ours._packed is not _packing.NOT_PACKED
    inputs = [x().requires_grad_(), x().requires_grad_()]
    for layer, input in zip((ours, theirs), inputs, strict=True):
        layer(input).sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)


def test_inference_mode() -> None:
    ours, theirs = pair()
    with torch.inference_mode():
        assert_like(ours(x()), theirs(x()))
    with torch.no_grad():
        assert_like(ours(x()), theirs(x()))  # the copy made in inference mode serves outside it
    ours(x()).sum().backward()


def test_meta_device_then_weights() -> None:
    meta = pbm.nn.Linear(K, N, device="meta")
    assert meta(torch.empty(3, K, device="meta")).shape == (3, N)
    _, theirs = pair()
    empty = copy.deepcopy(meta).to_empty(device="cpu")
    empty.load_state_dict(theirs.state_dict())
    meta.load_state_dict(theirs.state_dict(), assign=True)
    with torch.no_grad():
        for layer in (meta, empty):
            assert_like(layer(x()), theirs(x()))


def test_computed_weights() -> None:
    with torch.no_grad():
        ours, theirs = pair()
        for layer in (ours, theirs):
            layer(x())
            parametrizations.orthogonal(layer)
        ours.load_state_dict(theirs.state_dict())
        assert_like(ours(x()), theirs(x()), 1e-5)
        ours.parametrizations.weight.original.add_(torch.ones(N, K).tril())
        assert difference(ours(x()), theirs(x()))[0] > 1e-3

        ours, theirs = pair()
        for layer in (ours, theirs):
            layer(x())
            prune.l1_unstructured(layer, "weight", amount=0.5)
        assert_like(ours(x()), theirs(x()))

        ours, theirs = pair()
        for layer in (ours, theirs):
            layer(x())
            prune.l1_unstructured(layer, "bias", amount=0.5)  # bias alone is no Parameter now
        assert_like(ours(x()), theirs(x()))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_functional_call_and_vmap() -> None:
    ours, theirs = pair()
    other = {"weight": torch.randn(N, K), "bias": torch.randn(N)}
    call = torch.func.functional_call
    with torch.no_grad():
        ours(x())
        assert_like(call(ours, other, (x(),)), call(theirs, other, (x(),)))
        assert_like(ours(x()), theirs(x()))
        many = {name: torch.stack([value, 2 * value]) for name, value in other.items()}
        input = x()
        got, expected = (
            torch.vmap(lambda parameters, layer=layer: call(layer, parameters, (input,)))(many)
            for layer in (ours, theirs)
        )
        assert_like(got, expected)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("which", ["input", "weight", "bias"])
def test_forward_mode_is_refused(which: str) -> None:
    ours, _ = pair()
    with torch.no_grad(), forward_ad.dual_level():
        ours(x())
        input = x()
        if which == "input":
            input = forward_ad.make_dual(input, torch.ones_like(input))
        else:
            value = getattr(ours, which).detach()
            delattr(ours, which)
            setattr(ours, which, forward_ad.make_dual(value, torch.ones_like(value)))
        with pytest.raises(NotImplementedError, match=f"{which} is a dual tensor"):
            ours(input)


def test_jit_trace_does_not_bake_the_copy_in() -> None:
    ours, _ = pair()
    with torch.no_grad(), pytest.warns(DeprecationWarning):
        ours(x())
        traced = torch.jit.trace(ours, (x(),))
        other = nn.Linear(K, N)
        traced.load_state_dict(other.state_dict())
        assert_like(traced(x()), other(x()))


def test_a_layout_or_device_without_kernels_is_named() -> None:
    ours, _ = pair()
    ours.weight = nn.Parameter(ours.weight.detach().to_sparse(), requires_grad=False)
    got = r"no kernel for input a Tensor \(torch.strided, cpu\), weight a Parameter \(torch.sparse"
    with pytest.raises(NotImplementedError, match=got):
        ours(x())


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_inputs_are_named(layout: torch.layout, grad: bool) -> None:
    ours, theirs = pair()
    int8 = pbm.nn.Int8Linear.from_linear(theirs)
    nested = torch.nested.nested_tensor([x(3), x(5)], layout=layout)
    with torch.set_grad_enabled(grad):
        ours(x()), int8(x())
        for layer in (ours, int8):
            named = rf"{type(layer).__name__} has no kernel for input a nested .*{layout}, cpu"
            with pytest.raises(NotImplementedError, match=named):
                layer(nested)


@pytest.mark.parametrize("grad", [True, False])
def test_fx(grad: bool) -> None:
    ours, theirs = pair()
    int8 = pbm.nn.Int8Linear.from_linear(theirs)
    with torch.set_grad_enabled(grad):
        for layer, op in ((ours, "linear"), (int8, "int8_linear")):
            layer(x())  # a packed copy must not get into the graph
            traced = torch.fx.symbolic_trace(nn.Sequential(layer, nn.ReLU()))
            called = [str(n.target) for n in traced.graph.nodes if n.op == "call_function"]
            assert called == [f"pybigmodel.{op}.default"]
            assert torch.equal(traced(x()), layer(x()).relu())
    theirs.zero_grad()
    torch.fx.symbolic_trace(ours)(x()).sum().backward()
    theirs(x()).sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)


def test_flops_are_counted() -> None:
    ours, theirs = pair()
    int8 = pbm.nn.Int8Linear.from_linear(theirs)

    def flops(layer: nn.Module, grad: bool) -> int:
        with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
            y = layer(x())
            if grad:
                y.sum().backward()
        return counter.get_total_flops()

    packed = pbm.ops.pack_linear_weight(theirs.weight.detach())
    assert flops(theirs, False) == 2 * 5 * K * N
    for layer in (ours, int8, lambda x: pbm.ops.linear_packed(x, packed, N)):
        assert flops(layer, False) == flops(theirs, False)
    assert flops(ours, True) == flops(theirs, True) == 4 * 5 * K * N


def test_from_linear_refuses_computed_weights() -> None:
    _, theirs = pair()
    parametrizations.weight_norm(theirs)
    with pytest.raises(ValueError, match="linear must hold weight and bias as Parameters"):
        pbm.nn.Linear.from_linear(theirs)


def test_hooks() -> None:
    ours, _ = pair()
    seen = []
    ours.register_forward_pre_hook(lambda module, args: seen.append("pre"))
    ours.register_forward_hook(lambda module, args, output: output * 2)
    ours.register_full_backward_hook(lambda module, grad_in, grad_out: seen.append("backward"))
    y = ours(x().requires_grad_())
    y.sum().backward()
    assert seen == ["pre", "backward"]
    assert_like(y, 2 * nn.functional.linear(x(), ours.weight, ours.bias))
