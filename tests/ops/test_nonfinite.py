"""NaN, infinity, subnormals, huge values: nothing is hidden, and nothing spreads to other rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from linear_cases import ACTIVATIONS, FLOATS, linear64
from torch import Tensor

from pybigmodel import ops
from pybigmodel.reference.linear import ACTIVATION_FUNCTIONS
from pybigmodel.testing import assert_exact, assert_no_worse

M, N, K = 7, 35, 70
W = torch.randn(N, K, generator=torch.Generator().manual_seed(1))
Q, SCALE = ops.quantize_weight(W)
Op = Callable[[Tensor], Tensor]
OPS: dict[str, Op] = {
    "linear": lambda x: ops.linear(x, W.to(x.dtype)),
    "linear bf16": lambda x: ops.linear(x, W.to(x.dtype), precision="bf16"),
    "packed": lambda x: ops.linear_packed(x, ops.pack_linear_weight(W), N),
    "packed bf16": lambda x: ops.linear_packed(x, ops.pack_linear_weight(W, "bf16"), N),
    "int8": lambda x: ops.int8_linear(x, ops.pack_int8_linear_weight(Q), SCALE),
    "int8 symmetric": lambda x: ops.int8_linear(
        x, ops.pack_int8_linear_weight(Q), SCALE, symmetric=True
    ),
    "weight only": lambda x: ops.int8_weight_only_linear(x, ops.pack_int8_linear_weight(Q), SCALE),
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("op", OPS)
def test_a_bad_input_spoils_its_row_only(isa: str, op: str, dtype: torch.dtype, bad: float) -> None:
    original = torch.randn(M, K).to(dtype)
    clean = OPS[op](original)
    assert clean.isfinite().all()
    for at in (0, 15, 16, 63, 64, K - 1):
        x = original.clone()
        x[3, at] = bad
        y = OPS[op](x)
        if bad != bad or "int8" in op or op == "weight only":  # integers know no infinity: NaN
            assert y[3].isnan().all()
        else:
            assert torch.equal(y[3], torch.inf * W[:, at].sign().to(dtype) * (1 if bad > 0 else -1))
        keep = [i for i in range(M) if i != 3]
        assert_exact(y[keep], clean[keep])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bad_weight_spoils_its_column_only(isa: str, precision: str, bad: float) -> None:
    x, w = torch.randn(M, K), W.clone()
    clean = ops.linear(x, w, precision=precision)  # type: ignore[arg-type]
    w[N - 1, K - 1] = bad
    packed = ops.linear_packed(x, ops.pack_linear_weight(w, precision), N)  # type: ignore[arg-type]
    for y in (ops.linear(x, w, precision=precision), packed):  # type: ignore[arg-type]
        assert not y[:, N - 1].isfinite().any()
        assert_exact(y[:, : N - 1], clean[:, : N - 1])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("where", ["bias", "residual"])
def test_epilogues_pass_on_what_is_not_finite(isa: str, where: str, activation: str) -> None:
    x = torch.randn(3, 20)
    w = ops.pack_linear_weight(torch.zeros(18, 20))
    values = torch.zeros(18)
    values[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    bias = values if where == "bias" else None
    residual = values.expand(3, 18) if where == "residual" else None
    y = ops.linear_packed(x, w, 18, bias, activation=activation, residual=residual)  # type: ignore[arg-type]
    assert y[:, 0].isnan().all()
    if where == "residual":
        assert_exact(y, residual)
        return
    expected = ACTIVATION_FUNCTIONS[activation](values.double()).float()
    finite = expected.isfinite()
    assert_exact(y[:, finite], expected[finite].expand(3, -1))
    # Infinities become NaN where torch's formula is ∞·0 (gelu and silu of −∞); gelu of +∞ may.
    wrong = y[0].isfinite() & ~finite
    assert not wrong.any()


@pytest.mark.parametrize("op", ["linear", "packed"])
def test_subnormal_fp32(isa: str, op: str) -> None:
    x = torch.randn(M, K) * 1e-39
    exact = linear64(x, W)
    y = OPS[op](x)
    assert ((y.double() - exact).abs() <= K * 2.0**-149 + exact.abs() * 2.0**-20).all()


@pytest.mark.parametrize("op", ["linear bf16", "packed bf16"])
def test_subnormal_bf16_is_zero_or_right(isa: str, op: str) -> None:
    """VDPBF16PS takes subnormals for zero; the other tiers do not."""
    x = torch.randn(M, K) * 2.0**-130
    y, exact = OPS[op](x), linear64(x.bfloat16(), W.bfloat16())
    if isa == "avx512_bf16":
        assert (y == 0).all()
    else:
        assert ((y.double() - exact).abs() <= K * 2.0**-149 + exact.abs() * 2.0**-20).all()


@pytest.mark.parametrize("op", OPS)
def test_huge_inputs(isa: str, op: str) -> None:
    """1e36 times weights of order 1: far from overflow, and no intermediate step may overflow."""
    x = torch.randn(M, K)
    huge, usual = (float(relative_error(op, scale * x)) for scale in (1e36, 1.0))
    # The same digits but for what 1e36 rounds in x; int8 and bf16 round x again, elsewhere.
    assert huge <= 1.25 * usual


def relative_error(op: str, x: Tensor) -> Tensor:
    exact = linear64(x, W)
    return (OPS[op](x).double() - exact).norm() / exact.norm()


@pytest.mark.parametrize("op", ["linear", "packed"])
def test_overflow_is_infinity(isa: str, op: str) -> None:
    """Terms of one sign a column: whatever their order, the sum is ∞ with that sign."""
    sign = W[:, :1].sign()
    w = sign * W.abs().clamp(0.5, 1.0)
    x = torch.full((2, K), 3e38)
    y = ops.linear(x, w) if op == "linear" else ops.linear_packed(x, ops.pack_linear_weight(w), N)
    assert_exact(y, (torch.inf * sign).t().expand(2, N))
    half = ops.linear_packed(
        torch.full((1, 4), 6e4).half(), ops.pack_linear_weight(torch.ones(2, 4)), 2
    )
    assert_exact(half, torch.full((1, 2), torch.inf).half())


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_of_zeros(isa: str, dtype: torch.dtype, op: str) -> None:
    x = torch.randn(M, K).to(dtype)
    x[2], x[5] = 0.0, -0.0
    y = OPS[op](x)
    assert (y[[2, 5]] == 0).all() and (y[3] != 0).any()


def test_flushed_subnormals(isa: str) -> None:
    """torch.set_flush_denormal changes the FPU's mode under the kernels' feet: they stay right."""
    x = torch.randn(M, K)
    x[0] *= 1e-38
    expected = {op: f(x)[1:] for op, f in OPS.items()}
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        for op, f in OPS.items():
            assert_exact(f(x)[1:], expected[op])
            assert (f(x)[0].abs() < 1e-35).all()
    finally:
        torch.set_flush_denormal(False)


def test_fp16_beyond_its_range_inside() -> None:
    """fp32 accumulators: sums leave fp16's range on the way and come back."""
    x = torch.cat([torch.full((1, 32), 3e4), torch.full((1, 32), -3e4)], 1).half()
    w = torch.ones(3, 64).half()
    assert_exact(ops.linear(x, w), torch.zeros(1, 3).half())
    assert_no_worse(ops.linear(x, w), F.linear(x.float(), w.float()).half(), linear64(x, w))
