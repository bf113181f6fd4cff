"""What torch demands of the linear ops: compile, export, autograd's refusals; residuals, names."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from linear_cases import packed_int8
from torch import Tensor, nn
from torch.autograd import forward_ad

from pybigmodel import ops
from pybigmodel.testing import assert_exact, assert_no_worse


class Net(nn.Module):
    """Every op in one graph, with sizes that depend on the input's."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(18, 20) / 5)
        self.bias = nn.Parameter(torch.randn(18))
        self.register_buffer("packed", ops.pack_linear_weight(self.weight.detach()))
        packed, scale = packed_int8()
        self.register_buffer("int8", packed)
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.bias.detach()
        y = ops.linear(x, self.weight.detach(), bias, activation="gelu")
        y = ops.linear_packed(x, self.packed, 18, bias, activation="silu", residual=y)
        y = y + ops.int8_linear(x, self.int8, self.scale, bias, residual=y)
        y = y + ops.int8_weight_only_linear(x, self.int8, self.scale, activation="relu")
        q, scale, zero = ops.quantize_per_token(y)
        return (q.float() - zero.unsqueeze(-1)) * scale.unsqueeze(-1)


@pytest.fixture(scope="module", autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


BACKEND = "aot_eager"  # tracing, fake kernels and autograd; inductor would need a compiler for each


@torch.no_grad()
def test_compile_static_and_dynamic() -> None:
    net = Net()
    for dynamic in (False, True):
        compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=BACKEND)
        for rows in (3, 7, 64):
            x = torch.randn(2, rows, 20)
            assert_exact(compiled(x), net(x))


@torch.no_grad()
def test_dynamic_shapes_do_not_recompile() -> None:
    net, traced = Net(), []

    def count(graph: Any, inputs: Any) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=count)
    for rows in (3, 7, 64, 1000):
        compiled(torch.randn(2, rows, 20))
    assert len(traced) == 1


def test_compile_training() -> None:
    x = torch.randn(2, 7, 20)
    leaves = [torch.randn(18, 20, requires_grad=True), torch.randn(18, requires_grad=True)]

    def loss(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return ops.linear(x, w, b, activation="gelu").square().mean()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=BACKEND)
    expected = torch.autograd.grad(loss(x, *leaves), leaves)
    for actual, reference in zip(
        torch.autograd.grad(compiled(x, *leaves), leaves), expected, strict=True
    ):
        assert_no_worse(actual, reference, reference.double())


@torch.no_grad()
def test_export() -> None:
    net, rows = Net().eval(), torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(net, (torch.randn(2, 7, 20),), dynamic_shapes=({1: rows},))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    for op in (
        "linear",
        "linear_packed",
        "int8_linear",
        "int8_weight_only_linear",
        "quantize_per_token",
    ):
        assert f"pybigmodel.{op}.default" in called
    for count in (2, 31, 500):
        x = torch.randn(2, count, 20)
        assert_exact(program.module()(x), net(x))


@torch.no_grad()
def test_compile_of_packing() -> None:
    """Packing inside a graph: what a layer does whose weight changed."""

    def f(x: Tensor, w: Tensor) -> Tensor:
        q, scale, _ = ops.quantize_per_token(w, symmetric=True)
        y = ops.int8_linear(x, ops.pack_int8_linear_weight(q), scale)
        return y + ops.linear_packed(x, ops.pack_linear_weight(w, "bf16"), w.shape[0])

    compiled = torch.compile(f, fullgraph=True, dynamic=True, backend=BACKEND)
    for m, n, k in [(3, 18, 20), (5, 33, 47)]:
        x, w = torch.randn(m, k), torch.randn(n, k)
        assert_exact(compiled(x, w), f(x, w))


def test_second_gradient_is_refused() -> None:
    x, w = torch.randn(5, 20, requires_grad=True), torch.randn(18, 20, requires_grad=True)
    (dx,) = torch.autograd.grad(ops.linear(x, w).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"linear.*gradient of its gradient"):
        torch.autograd.grad(dx.sum(), w)


@pytest.mark.parametrize("argument", ["input", "bias", "residual"])
def test_inference_ops_refuse_gradients(argument: str) -> None:
    packed, scale = packed_int8()
    panels = ops.pack_linear_weight(torch.randn(18, 20))
    given = {"input": torch.randn(5, 20), "bias": torch.randn(18), "residual": torch.randn(5, 18)}
    given[argument].requires_grad_()
    x = given.pop("input")
    calls: list[Callable[[], Tensor]] = [
        lambda: ops.linear_packed(x, panels, 18, **given),
        lambda: ops.int8_linear(x, packed, scale, **given),
        lambda: ops.int8_weight_only_linear(x, packed, scale, **given),
    ]
    for call in calls:
        with pytest.raises(RuntimeError, match=rf"{argument} requires grad.*no gradient"):
            call()
        with torch.no_grad():
            call()


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap() -> None:
    """torch falls back to a loop for ops without a batching rule: slow, and right."""
    x, w = torch.randn(4, 5, 20), torch.randn(18, 20, requires_grad=True)
    y = torch.func.vmap(lambda t: ops.linear(t, w))(x)
    assert_exact(y, ops.linear(x, w))
    (got,), (expected,) = (torch.autograd.grad(z.square().sum(), w) for z in (y, ops.linear(x, w)))
    assert_no_worse(got, expected, expected.double())


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["input", "weight", "bias", "residual"])
def test_forward_mode_is_refused(name: str) -> None:
    packed, scale = packed_int8()
    given = {"input": torch.randn(5, 20), "bias": torch.randn(18), "residual": torch.randn(5, 18)}
    given["weight"] = torch.randn(18, 20)
    panels = ops.pack_linear_weight(given["weight"])
    with torch.no_grad(), forward_ad.dual_level():
        given[name] = forward_ad.make_dual(given[name], torch.ones_like(given[name]))
        x, w, rest = given.pop("input"), given.pop("weight"), given
        calls: dict[str, Callable[[], Any]] = {
            "linear": lambda: ops.linear(x, w, **rest),
            "linear_packed": lambda: ops.linear_packed(x, panels, 18, **rest),
            "int8_linear": lambda: ops.int8_linear(x, packed, scale, **rest),
            "int8_weight_only_linear": lambda: ops.int8_weight_only_linear(
                x, packed, scale, **rest
            ),
        }
        if name == "input":
            calls["quantize_per_token"] = lambda: ops.quantize_per_token(x)
        if name == "weight":
            calls = {
                "linear": calls["linear"],
                "pack_linear_weight": lambda: ops.pack_linear_weight(w),
            }
        if name == "residual":  # of linear it is torch's addition
            tangent = forward_ad.unpack_dual(calls.pop("linear")()).tangent
            assert_exact(tangent, torch.ones(5, 18))
        for op, call in calls.items():
            with pytest.raises(NotImplementedError, match=f"{op}: {name} is a dual tensor"):
                call()


def test_the_residual_of_linear_has_the_outputs_shape_and_dtype() -> None:
    x, w = torch.randn(5, 20), torch.randn(18, 20)
    for bad in (torch.randn(18), torch.randn(3, 5, 18), torch.randn(5, 18).double()):
        got = rf"got {str(bad.dtype)[6:]} of shape {re.escape(str(tuple(bad.shape)))}"
        with pytest.raises(RuntimeError, match=f"linear: residual must be float32 of .*{got}"):
            ops.linear(x, w, residual=bad)
    good = torch.randn(5, 18)
    compiled = torch.compile(
        lambda r: ops.linear(x, w, residual=r), fullgraph=True, backend=BACKEND
    )
    assert_exact(compiled(good), ops.linear(x, w, residual=good))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.linear(x, w, residual=good).dtype == torch.bfloat16


def test_unhashable_names_are_refused() -> None:
    x, w = torch.randn(5, 20), torch.randn(18, 20)
    with pytest.raises(ValueError, match=r"precision must be 'fp32' or 'bf16'; got \[\]"):
        ops.linear(x, w, precision=[])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activation must be one of .*; got \[\]"):
        ops.linear(x, w, activation=[])  # type: ignore[arg-type]
