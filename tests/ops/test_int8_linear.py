"""int8_linear and int8_weight_only_linear: values, bounds, epilogues, layouts, tiers, threads."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from linear_cases import ACTIVATIONS, FLOATS, SHAPES, layouts, linear64
from torch import Tensor

from pybigmodel import _native, ops
from pybigmodel.reference import linear as reference
from pybigmodel.testing import assert_exact, assert_no_worse, available_isas, force_isa

KINDS = ["asymmetric", "symmetric", "weight only"]
LONG = [(2, 17, 16385), (2, 3, 65793)]  # beyond one panel of 4,096 lanes; the longest allowed


class Weight:
    def __init__(self, n: int, k: int) -> None:
        self.q = torch.randint(-127, 128, (n, k), dtype=torch.int8)
        self.scale = (torch.rand(n) + 0.1) / 100
        self.packed = ops.pack_int8_linear_weight(self.q)

    def run(self, kind: str, x: Tensor, bias: Tensor | None = None, **more: object) -> Tensor:
        arguments = (x, self.packed, self.scale, bias)
        if kind == "weight only":
            return ops.int8_weight_only_linear(*arguments, **more)  # type: ignore[arg-type]
        return ops.int8_linear(*arguments, symmetric=kind == "symmetric", **more)  # type: ignore[arg-type]

    def exact(self, kind: str, x: Tensor, bias: Tensor | None = None, **more: object) -> Tensor:
        if kind == "weight only":
            b = None if bias is None else bias.double()
            r = more.pop("residual", None)
            r = r.double() if isinstance(r, Tensor) else None
            w = self.q.double() * self.scale.double()[:, None]
            return reference.linear(x.double(), w, b, residual=r, **more)  # type: ignore[arg-type]
        symmetric = kind == "symmetric"
        return reference.int8_linear(
            x,
            self.q,
            self.scale,
            bias,
            symmetric=symmetric,
            **more,  # type: ignore[arg-type]
        )


def within_rounding(actual: Tensor, exact: Tensor, ulps: float = 3) -> None:
    """Integer sums are exact, so that only the epilogue's few fp32 roundings remain."""
    eps = torch.finfo(torch.float32).eps
    tolerance = ulps * eps * exact.abs() + ulps * eps * exact.abs().amax() * 1e-3
    if actual.dtype != torch.float32:
        tolerance = tolerance + torch.finfo(actual.dtype).eps * exact.abs() / 2
        tolerance = (
            tolerance + torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
        )
    off = (actual.double() - exact).abs()
    assert (off <= tolerance).all(), (
        f"{off.max():.3g} is above {tolerance.flatten()[off.argmax()]:.3g}"
    )


@pytest.mark.parametrize("shape", SHAPES + LONG, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("symmetric", [False, True])
def test_int8_linear(
    isa: str, symmetric: bool, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    m, n, k = shape
    w, x = Weight(n, k), torch.randn(m, k).to(dtype)
    kind = "symmetric" if symmetric else "asymmetric"
    actual = w.run(kind, x)
    assert _native.last_kernel() == f"gemm_u8s8.{isa}"
    within_rounding(actual, w.exact(kind, x))


@pytest.mark.parametrize("shape", SHAPES + LONG, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_weight_only(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    w, x = Weight(n, k), torch.randn(m, k).to(dtype)
    actual = w.run("weight only", x)
    assert _native.last_kernel() == f"gemm_u8s8.{isa}"
    dequantised = (w.q * w.scale[:, None]).to(dtype)
    assert_no_worse(actual, F.linear(x, dequantised), w.exact("weight only", x))
    check_fixed_point_bound(w, x, actual)


def check_fixed_point_bound(w: Weight, x: Tensor, actual: Tensor) -> None:
    """The docstring's bound: every element of x is carried to 2⁻²³ of the row's largest."""
    exact = w.exact("weight only", x)
    scale = w.scale.double()
    weights = w.q.double().abs().sum(1) * scale
    carried = x.double().abs().amax(-1, keepdim=True) * 2.0**-23 * weights
    rounded = (x.double().abs() @ w.q.double().abs().t()) * scale * 2.0**-22
    dtype_rounding = exact.abs() * torch.finfo(actual.dtype).eps
    assert ((actual.double() - exact).abs() <= carried + rounded + dtype_rounding).all()


@pytest.mark.parametrize("outlier", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("k", [256, 768, 4096])
def test_weight_only_with_outliers(isa: str, k: int, outlier: float) -> None:
    """One element of each row dwarfs the rest: the others lose digits, within the stated bound.

    fp32 sums lose less here (docs/numerics.md has the figures), so the bound takes the policy's
    place: elements are rounded to steps of 2⁻²²·max|x| at most, an error of 0.29 steps each.
    """
    w, x = Weight(48, k), torch.randn(16, k)
    x[torch.arange(16), torch.randint(k, (16,))] *= outlier
    actual, exact = w.run("weight only", x), w.exact("weight only", x)
    check_fixed_point_bound(w, x, actual)
    steps = x.abs().amax(-1, keepdim=True).double() * 2.0**-22
    norms = (w.q.double() * w.scale.double()[:, None]).norm(dim=1)
    assert (actual - exact).norm() <= 1.5 * 0.29 * (steps * norms).norm() + 2**-23 * exact.norm()


@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("exponent", [-99, -30, 0, 1, 60, 100])
def test_weight_only_of_all_ones_mantissas(isa: str, exponent: int, sign: float) -> None:
    """The largest fp32 below a power of two fills every digit, and must not carry out of them."""
    x = torch.full((1, 16), sign * (2 - 2.0**-23) * 2.0**exponent)
    w = torch.zeros(16, 16, dtype=torch.int8).fill_diagonal_(127)
    y = ops.int8_weight_only_linear(x, ops.pack_int8_linear_weight(w), torch.full((16,), 2.0**-7))
    exact = x.double() * 127 * 2.0**-7
    assert ((y.double() - exact).abs() <= exact.abs() * 2.0**-22).all()


@pytest.mark.parametrize("size", [1e-36, 1e-30, 1e-20, 1e20, 1e30, 1e36])
@pytest.mark.parametrize("kind", KINDS)
def test_small_and_large_rows(isa: str, kind: str, size: float) -> None:
    """Rows of any magnitude keep their precision: no product of scales leaves fp32's range."""
    w, x = Weight(33, 100), torch.randn(5, 100) * size
    w.scale = torch.rand(33) / 1000 + 1e-3
    actual, exact = w.run(kind, x), w.exact(kind, x)
    assert exact.abs().amax() < 1e38
    off = (actual.double() - exact).norm() / exact.norm()
    if kind == "weight only" and size < 2.0**-100:  # what the smallest step leaves
        absolute = 2.0**-123 * w.q.double().abs().sum(1) * w.scale.double()
        assert ((actual.double() - exact).abs() <= absolute + 2.0**-149).all()
    else:
        assert off <= 1e-6, f"relative error {off:.3g}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("bias_dtype", [None, "input", torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_epilogue(
    isa: str,
    dtype: torch.dtype,
    activation: str,
    bias_dtype: object,
    with_residual: bool,
    kind: str,
) -> None:
    w, x = Weight(50, 65), torch.randn(19, 65).to(dtype)
    bias = None if bias_dtype is None else torch.randn(50)
    if bias is not None and bias_dtype == "input":
        bias = bias.to(dtype)
    more: dict[str, object] = {"activation": activation}
    if with_residual:
        more["residual"] = torch.randn(19, 50).to(dtype)
    actual, exact = w.run(kind, x, bias, **more), w.exact(kind, x, bias, **more)
    assert actual.dtype == dtype
    within_rounding(actual, exact, ulps=4000 if kind == "weight only" else 400)
    # The norm is tighter: what bias, activation and residual add is a few fp32 roundings.
    eps = torch.finfo(dtype).eps
    assert (actual.double() - exact).norm() <= 0.6 * max(eps, 1e-6) * exact.norm()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (4,), (2, 3), (2, 1, 3), (2, 2, 1, 2, 2)], ids=str)
def test_leading_dimensions(isa: str, lead: tuple[int, ...], kind: str) -> None:
    w, x = Weight(18, 20), torch.randn(*lead, 20)
    residual = torch.randn(*lead, 18)
    expected = w.run(kind, x.reshape(-1, 20), residual=residual.reshape(-1, 18))
    assert_exact(w.run(kind, x, residual=residual), expected.view(*lead, 18))


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0), (3, 0, 0)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty(isa: str, dtype: torch.dtype, kind: str, m: int, n: int, k: int) -> None:
    w, x, b = Weight(n, k), torch.randn(2, m, k).to(dtype), torch.randn(n).to(dtype)
    residual = torch.randn(2, m, n).to(dtype)
    actual = w.run(kind, x, b, activation="relu", residual=residual)
    assert actual.shape == (2, m, n)
    if k == 0:
        assert_exact(actual, b.relu().expand(2, m, n) + residual)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(5, 18, 21), (7, 1, 1), (1, 33, 64)], ids=str)
def test_strides(isa: str, shape: tuple[int, int, int], dtype: torch.dtype, kind: str) -> None:
    m, n, k = shape
    w, x, residual = Weight(n, k), torch.randn(2, m, k).to(dtype), torch.randn(2, m, n).to(dtype)
    bias = torch.randn(n).to(dtype)
    plain = w.run(kind, x, bias, residual=residual)
    for (_, xs), (_, rs) in zip(layouts(x), layouts(residual), strict=True):
        strided = Weight(n, k)
        strided.packed, strided.scale = w.packed, w.scale.repeat_interleave(3)[::3]
        assert_exact(strided.run(kind, xs, bias.repeat_interleave(2)[::2], residual=rs), plain)
    expanded = x[:1, :1].expand(2, m, k)
    assert_exact(w.run(kind, expanded), w.run(kind, expanded.contiguous()))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("offset", [1, 3, 64])
def test_misaligned_packed_weight(isa: str, offset: int, kind: str) -> None:
    w, x = Weight(33, 70), torch.randn(4, 70)
    plain = w.run(kind, x)
    store = torch.full((w.packed.numel() + offset,), 111, dtype=torch.int8)
    store[offset:] = w.packed.flatten()
    w.packed = store[offset:].view(w.packed.shape)
    assert_exact(w.run(kind, x), plain)


@pytest.mark.parametrize("kind", KINDS)
def test_threads_and_repeats_agree(isa: str, threads: None, kind: str) -> None:
    for m, n, k in [(1, 400, 600), (8, 330, 515), (400, 65, 64), (5, 40, 17000)]:
        w, x = Weight(n, k), torch.randn(m, k)
        results = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            results.append(w.run(kind, x))
        for result in results[1:]:
            assert_exact(result, results[0])


@pytest.mark.parametrize("kind", ["asymmetric", "symmetric"])
def test_tiers_agree_to_the_bit(kind: str) -> None:
    """Quantisation, integer sums and the linear part of the epilogue round alike on every tier."""
    w, x, bias = Weight(83, 700), torch.randn(37, 700), torch.randn(83)
    residual = torch.randn(37, 83)
    results = []
    for name in available_isas():
        with force_isa(name):
            results.append(w.run(kind, x, bias, residual=residual))
    for result in results[1:]:
        assert_exact(result, results[0])


@pytest.mark.parametrize("op", [ops.int8_linear, ops.int8_weight_only_linear])
def test_too_long(op: Callable[..., Tensor]) -> None:
    message = "in_features must be at most 65793.*65794"
    with pytest.raises(RuntimeError, match=message):
        ops.pack_int8_linear_weight(torch.zeros(1, 65794, dtype=torch.int8))
    packed = torch.zeros(1, 65794 // 4 + 2, 64, dtype=torch.int8)
    with pytest.raises(RuntimeError, match=message):
        op(torch.zeros(1, 65794), packed, torch.ones(1))


@pytest.mark.parametrize("value", [1.0, -1.0])
def test_largest_sums(isa: str, value: float) -> None:
    """65,793 products of 255 and −128: 10,368 short of overflow."""
    w, x = Weight(1, 65793), torch.full((1, 65793), value)
    w.q.fill_(-128)
    w.packed = ops.pack_int8_linear_weight(w.q)
    for kind in KINDS:
        within_rounding(w.run(kind, x), w.exact(kind, x))


def test_smaller_error_than_per_tensor() -> None:
    """Why rows have scales of their own: against one scale for the whole tensor."""
    x = torch.randn(64, 768) * torch.logspace(-1, 1, 64)[:, None]
    weight = torch.randn(256, 768) / 28
    q, scale = ops.quantize_weight(weight)
    exact = linear64(x, weight)
    ours = ops.int8_linear(x, ops.pack_int8_linear_weight(q), scale)
    step = (x.max() - x.min()) / 255
    per_tensor = (x / step).round() * step
    theirs = linear64(per_tensor, q.double() * scale.double()[:, None])
    rows = exact.norm(dim=1)
    ours_error = ((ours - exact).norm(dim=1) / rows).mean()
    theirs_error = ((theirs - exact).norm(dim=1) / rows).mean()
    assert ours_error < 0.015
    assert ours_error < theirs_error / 2
