"""attention under torch.compile, torch.export, torch.autocast and torch.func."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pybigmodel import ops
from pybigmodel.reference import attention as reference
from pybigmodel.testing import assert_exact, assert_no_worse

BACKEND = "aot_eager"  # tracing, fake kernels and autograd; inductor would need a compiler for each
F32 = torch.float32
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "much": {"window": (9, 2), "softcap": 3.0, "dropout_p": 0.2, "dropout_seed": 5, "scale": 0.3},
    "top_left": {"causal": True, "causal_align": "top_left", "precision": "bf16"},
}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def qkv(b: int, hq: int, hkv: int, sq: int, sk: int, d: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (torch.randn(b, h, s, d) for h, s in ((hq, sq), (hkv, sk), (hkv, sk)))
    return q, k, v


# --- torch.compile and torch.export ---------------------------------------------------------------


class Net(nn.Module):
    """Self-attention with everything around it, as models have it, and packed attention."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(24, (4 + 2 + 2) * 6)
        self.bias = nn.Parameter(torch.randn(4, 1, 1))
        self.options = options

    def forward(self, x: Tensor) -> Tensor:
        b, s, _ = x.shape
        heads = self.qkv(x).unflatten(-1, (-1, 6))
        q, k, v = (t.transpose(1, 2) for t in heads.split([4, 2, 2], dim=2))
        y, lse = ops.attention(q, k, v, attn_mask=self.bias, return_lse=True, **self.options)
        starts = torch.arange(b + 1) * s
        packed = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
        z = ops.attention_varlen(*packed, starts, starts, **self.options)
        y = y.transpose(1, 2).flatten(2) + z.unflatten(0, (b, s)).flatten(2)
        return y + lse.mean()


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_compile_static_and_dynamic(options: dict[str, Any]) -> None:
    net = Net(**options)
    for dynamic in (False, True):
        compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=BACKEND)
        for rows in (3, 7, 64):
            x = torch.randn(2, rows, 24)
            assert_exact(compiled(x), net(x))


@torch.no_grad()
def test_dynamic_shapes_do_not_recompile() -> None:
    net, traced = Net(causal=True), []

    def count(graph: Any, inputs: Any) -> Callable[..., Any]:
        traced.append(graph)
        return graph.forward  # type: ignore[no-any-return]

    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=count)
    for batch, rows in ((2, 3), (3, 7), (4, 64), (2, 1000)):
        compiled(torch.randn(batch, rows, 24))
    assert len(traced) == 1


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_compile_training(options: dict[str, Any], dynamic: bool) -> None:
    net = Net(**options)
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=BACKEND)
    parameters = list(net.parameters())
    for rows in (7, 20):
        x = torch.randn(2, rows, 24)
        expected = torch.autograd.grad(net(x).square().mean(), parameters)
        got = torch.autograd.grad(compiled(x).square().mean(), parameters)
        for actual, other in zip(got, expected, strict=True):
            assert_no_worse(actual, other, other.double())


@torch.no_grad()
def test_compiled_dropout_draws_a_seed_a_call() -> None:
    q, k, v = qkv(1, 2, 2, 20, 30, 16)
    compiled = torch.compile(
        lambda: ops.attention(q, k, v, dropout_p=0.5), fullgraph=True, backend=BACKEND
    )
    torch.manual_seed(1)
    first, second = compiled(), compiled()
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert_exact(ops.attention(q, k, v, dropout_p=0.5), first)


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit, which Inductor loads
def test_inductor() -> None:
    net = Net(causal=True)
    compiled = torch.compile(net, fullgraph=True)
    x = torch.randn(2, 9, 24)
    torch.testing.assert_close(compiled(x), net(x))


@torch.no_grad()
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_export(options: dict[str, Any]) -> None:
    net = Net(**options).eval()
    rows = torch.export.Dim("rows", min=2, max=4096)
    program = torch.export.export(net, (torch.randn(2, 7, 24),), dynamic_shapes=({1: rows},))
    called = {str(n.target) for n in program.graph.nodes if n.op == "call_function"}
    assert {"pybigmodel.attention.default", "pybigmodel.attention_varlen.default"} <= called
    for count in (2, 31, 500):
        x = torch.randn(2, count, 24)
        assert_exact(program.module()(x), net(x))


# --- autocast -------------------------------------------------------------------------------------


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype, grad: bool) -> None:
    """As q, k and v in autocast's dtype; mask and slopes keep theirs."""
    q, k, v = (t.requires_grad_(grad) for t in qkv(2, 4, 2, 20, 30, 16))
    mask, slopes = torch.randn(20, 30, requires_grad=grad), torch.rand(4)
    options: dict[str, Any] = {"attn_mask": mask, "alibi_slopes": slopes, "return_lse": True}
    with torch.autocast("cpu", dtype=dtype):
        out, lse = ops.attention(q, k, v, **options)
        mixed, _ = ops.attention(q.to(dtype), k, v.to(dtype), **options)
    assert out.dtype == dtype and lse.dtype == F32
    expected, sums = ops.attention(q.to(dtype), k.to(dtype), v.to(dtype), **options)
    assert_exact(out, expected)
    assert_exact(mixed, expected)
    assert_exact(lse, sums)
    if grad:
        for got, other in zip(
            torch.autograd.grad(out.float().sum(), (q, k, v, mask)),
            torch.autograd.grad(expected.float().sum(), (q, k, v, mask)),
            strict=True,
        ):
            assert got.dtype == F32
            assert_exact(got, other)
    assert ops.attention(q, k, v).dtype == F32  # and in fp32 again outside


@pytest.mark.parametrize("mask_dtype", [torch.bfloat16, torch.float16, F32, torch.bool], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_a_mask(dtype: torch.dtype, mask_dtype: torch.dtype) -> None:
    """One of the other half dtype takes autocast's; its gradient is its own dtype's."""
    q, k, v = qkv(2, 4, 2, 20, 30, 16)
    mask = torch.randn(20, 30).to(mask_dtype).requires_grad_(mask_dtype != torch.bool)
    with torch.autocast("cpu", dtype=dtype):
        out = ops.attention(q, k, v, attn_mask=mask)
    kept = mask_dtype in (F32, torch.bool)
    expected = ops.attention(
        *(t.to(dtype) for t in (q, k, v)), attn_mask=mask if kept else mask.to(dtype)
    )
    assert_exact(out, expected)
    if mask.requires_grad:
        (got,), (other,) = (torch.autograd.grad(y.float().sum(), mask) for y in (out, expected))
        assert got.dtype == mask_dtype
        assert_exact(got, other)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_of_packed_sequences(dtype: torch.dtype) -> None:
    q, k, v = (torch.randn(10, h, 8) for h in (4, 2, 2))
    starts = torch.tensor([0, 4, 10])
    with torch.autocast("cpu", dtype=dtype):
        out = ops.attention_varlen(q, k, v, starts, starts)
    expected = ops.attention_varlen(*(t.to(dtype) for t in (q, k, v)), starts, starts)
    assert_exact(out, expected)


def test_disabled_autocast_and_float64() -> None:
    q, k, v = qkv(1, 2, 2, 5, 6, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autocast("cpu", enabled=False):
            assert ops.attention(q, k, v).dtype == F32
        with pytest.raises(RuntimeError, match=r"attention: q must be float32.*float64"):
            ops.attention(q.double(), k.double(), v.double())


# --- torch.func -----------------------------------------------------------------------------------

pytestmark = [
    # No batching rule: torch loops, and says so.
    pytest.mark.filterwarnings("ignore:There is a performance drop"),
    # torch 2.13's own, at the first use of forward mode.
    pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning"),
]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_vmap(options: dict[str, Any]) -> None:
    """Each example as alone: dropout too counts from its first batch entry."""
    x = torch.randn(3, 2, 4, 9, 16)
    k = torch.randn(2, 2, 12, 16, requires_grad=True)

    def f(q: Tensor) -> Tensor:
        return ops.attention(q, k, k, **options)

    got = torch.func.vmap(f)(x)
    expected = torch.stack([f(q) for q in x])
    assert_exact(got, expected)
    a, b = (torch.autograd.grad(y.square().sum(), k)[0] for y in (got, expected))
    assert_no_worse(a, b, b.double())


FUNCTIONS: dict[str, Callable[[Callable[..., Tensor], tuple[Tensor, ...]], Any]] = {
    "grad": lambda f, x: torch.func.grad(lambda *x: f(*x).square().sum(), (0, 1, 2))(*x),
    "vjp": lambda f, x: torch.func.vjp(f, *x)[1](torch.ones(1, 2, 5, 8)),
    "jacrev": lambda f, x: torch.func.jacrev(f)(*x),
    "per example": lambda f, x: torch.func.vmap(
        torch.func.grad(lambda q: f(q, x[1], x[2]).square().sum())
    )(torch.stack([x[0], 2 * x[0]])),
    "grad of vmap": lambda f, x: torch.func.grad(
        lambda q: torch.func.vmap(lambda q: f(q, x[1], x[2]))(q).square().sum()
    )(torch.stack([x[0], 2 * x[0]])),
}


@pytest.mark.parametrize("transform", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_reverse_mode_is_torchs(transform: Callable[..., Any]) -> None:
    x = qkv(1, 2, 2, 5, 6, 8)
    ours = transform(lambda q, k, v: ops.attention(q, k, v, scale=0.4), x)
    theirs = transform(lambda q, k, v: reference.attention(q, k, v, scale=0.4)[0], x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", FUNCTIONS.values(), ids=FUNCTIONS.keys())
def test_reverse_mode_of_packed_sequences(transform: Callable[..., Any]) -> None:
    """(1, H, S, D) as one packed sequence."""
    x = qkv(1, 2, 2, 5, 6, 8)
    starts = torch.tensor([0, 5]), torch.tensor([0, 6])

    def packed(*x: Tensor) -> Tensor:
        rows = (t.squeeze(0).transpose(0, 1) for t in x)
        out: Tensor = ops.attention_varlen(*rows, *starts, scale=0.4)  # type: ignore[assignment]
        return out.transpose(0, 1).unsqueeze(0)

    theirs = transform(lambda q, k, v: reference.attention(q, k, v, scale=0.4)[0], x)
    torch.testing.assert_close(transform(packed, x), theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("transform", [torch.func.hessian, torch.func.jacfwd])
def test_other_derivatives_are_refused(transform: Callable[..., Any]) -> None:
    q, k, v = qkv(1, 2, 2, 5, 6, 8)
    with pytest.raises((RuntimeError, NotImplementedError), match="attention: "):
        transform(lambda q: ops.attention(q, k, v).square().sum())(q)


def test_anomaly_mode_and_checkpointing() -> None:
    """Recomputed, the forward pass drops the same: torch restores its generator."""
    q, k, v = (t.requires_grad_() for t in qkv(1, 2, 2, 9, 12, 16))

    def f(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ops.attention(q, k, v, dropout_p=0.3)

    torch.manual_seed(4)
    plain = f(q, k, v)
    expected = torch.autograd.grad(plain.square().sum(), (q, k, v))
    torch.manual_seed(4)
    with torch.autograd.set_detect_anomaly(True, check_nan=True):
        again = torch.utils.checkpoint.checkpoint(f, q, k, v, use_reentrant=False)
        assert_exact(again, plain)
        for a, b in zip(
            torch.autograd.grad(again.square().sum(), (q, k, v)), expected, strict=True
        ):
            assert_exact(a, b)


# --- what torch counts, devices -------------------------------------------------------------------


def flops(f: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        f()
    return int(counter.get_total_flops())


def test_flops_are_those_of_the_products() -> None:
    q, k, v = (t.requires_grad_() for t in qkv(2, 4, 4, 9, 12, 16))
    mask = torch.randn(9, 12)
    starts = [torch.arange(3) * n for n in (9, 12)]
    packed = [t.transpose(1, 2).flatten(0, 1) for t in (q, k, v)]
    calls: tuple[Callable[[], Any], ...] = (
        lambda: q @ k.mT @ v,
        lambda: ops.attention(q, k, v),
        lambda: ops.attention(q, k, v, attn_mask=mask, causal=True),
        lambda: ops.attention_varlen(*packed, *starts),
        lambda: ops.attention_decode(
            q.detach(), k.detach(), v.detach(), torch.full((2,), 12, dtype=torch.int32)
        ),
    )
    forward = 2 * 2 * 4 * 9 * 12 * (16 + 16)
    assert [flops(f) for f in calls] == [forward] * len(calls)
    for f in calls[1:4]:
        with torch.enable_grad():
            assert flops(lambda f=f: f().sum().backward()) == forward + forward // 2 * 5  # type: ignore[misc]
    mask.requires_grad_()
    assert flops(lambda: calls[2]().sum().backward()) == forward + forward // 2 * 7
    uneven = torch.tensor([0, 1, 18]), torch.tensor([0, 20, 24])
    assert flops(lambda: ops.attention_varlen(*packed, *uneven)) == 2 * 4 * (20 + 17 * 4) * 32


def test_a_default_device_that_has_no_data() -> None:
    """The seed is a number, and is on the CPU whatever new tensors are."""
    q, k, v = qkv(1, 2, 2, 5, 6, 8)
    expected = ops.attention(q, k, v, dropout_p=0.5, dropout_seed=3)
    with torch.device("meta"):
        assert_exact(ops.attention(q, k, v, dropout_p=0.5, dropout_seed=3), expected)
        assert ops.attention(q, k, v, dropout_p=0.5).device.type == "cpu"  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match="attention: dropout_seed must be on the CPU"):
            ops.attention(q, k, v, dropout_p=0.5, dropout_seed=torch.zeros(1, dtype=torch.int64))


@pytest.mark.parametrize("name", ["attention", "attention_varlen"])
def test_the_ops_themselves_refuse_slopes_that_require_grad(name: str) -> None:
    slopes = torch.rand(2, requires_grad=True)
    options = (slopes, None, -1, -1, True, 0.0, 0.0, 1.0, 0)
    with pytest.raises(RuntimeError, match=f"{name}: alibi_slopes requires grad"):
        if name == "attention":
            q = torch.randn(1, 2, 5, 8)
            torch.ops.pybigmodel.attention(q, q, q, None, *options, False)
        else:
            q, starts = torch.randn(5, 2, 8), torch.tensor([0, 5])
            torch.ops.pybigmodel.attention_varlen(q, q, q, starts, starts, *options)
