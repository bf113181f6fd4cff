"""Gradients of linear: against float64 autograd under the policy, and through torch.autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from linear_cases import FLOATS, layouts
from torch import Tensor

import pybigmodel  # noqa: F401 (registers the ops)
from pybigmodel import _native, ops
from pybigmodel.testing import assert_exact, assert_no_worse

# rows and features on both sides of panels (16), tiles (6, 8), blocks of k (256, 512); long rows.
SHAPES = [
    (1, 1, 1),
    (2, 3, 5),
    (17, 16, 15),
    (8, 49, 65),
    (65, 64, 63),
    (257, 33, 40),
    (3, 300, 257),
]
SHAPES += [(5000, 19, 17)]


def gradients(
    f: object, dy: Tensor, x: Tensor, w: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (x, w, b)]
    y = f(*leaves)  # type: ignore[operator]
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    return dx, dw, db


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_against_autograd(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    x, w, b = torch.randn(m, k).to(dtype), (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n)
    b, dy = b.to(dtype), torch.randn(m, n).to(dtype)
    ours = gradients(ops.linear, dy, x, w, b)
    assert _native.last_kernel().endswith("." + isa)
    theirs = gradients(F.linear, dy, x, w, b)
    exact = gradients(F.linear, dy.double(), x.double(), w.double(), b.double())
    for actual, other, reference in zip(ours, theirs, exact, strict=True):
        assert_no_worse(actual, other, reference)


@pytest.mark.parametrize("activation", ["none", "gelu", "silu"])
def test_composed(isa: str, activation: str) -> None:
    """The fused-looking call under autograd, activation and residual included."""
    x, w, b = torch.randn(2, 5, 20), torch.randn(18, 20), torch.randn(18)
    r, dy = torch.randn(2, 5, 18), torch.randn(2, 5, 18)

    def run(f: object, dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype).requires_grad_() for t in (x, w, b, r)]
        y = f(*leaves)  # type: ignore[operator]
        return list(torch.autograd.grad(y, leaves, dy.to(dtype)))

    def plain(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        y = F.linear(x, w, b)
        return (y if activation == "none" else getattr(F, activation)(y)) + r

    def ours(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
        return ops.linear(x, w, b, activation=activation, residual=r)  # type: ignore[arg-type]

    results = zip(
        run(ours, torch.float32), run(plain, torch.float32), run(plain, torch.float64), strict=True
    )
    for actual, theirs, exact in results:
        assert_no_worse(actual, theirs, exact)


def test_precision_bf16(isa: str) -> None:
    """fp32 tensors, bf16 products in the backward too: no worse than torch's in bf16."""
    x, w, dy = torch.randn(40, 70), torch.randn(33, 70) / 8, torch.randn(40, 33)
    b = torch.randn(33)
    ours = gradients(lambda *t: ops.linear(*t, precision="bf16"), dy, x, w, b)
    assert _native.last_kernel() == f"gemm_bf16.{isa}"
    half = gradients(F.linear, dy.bfloat16(), x.bfloat16(), w.bfloat16(), b.bfloat16())
    exact = gradients(F.linear, dy.double(), x.double(), w.double(), b.double())
    for actual, other, reference in zip(ours, half, exact, strict=True):
        assert actual.dtype == torch.float32
        assert_no_worse(actual, other.float(), reference)


@pytest.mark.parametrize("needs", range(8))
def test_only_what_is_needed(needs: int) -> None:
    wanted = [bool(needs & 1 << i) for i in range(3)]
    x, w, dy = torch.randn(6, 20), torch.randn(18, 20), torch.randn(6, 18)
    got = torch.ops.pybigmodel.linear_backward(dy, x, w, 0, *wanted)
    full = torch.ops.pybigmodel.linear_backward(dy, x, w, 0, True, True, True)
    for part, whole, want in zip(got, full, wanted, strict=True):
        assert_exact(part, whole if want else torch.empty(0))
    leaves = [
        t.clone().requires_grad_(want)
        for t, want in zip((x, w, torch.randn(18)), wanted, strict=True)
    ]
    if not needs:
        return
    ops.linear(*leaves).backward(dy)
    for leaf, whole, want in zip(leaves, full, wanted, strict=True):
        assert (leaf.grad is not None) == want
        if want:
            assert_exact(leaf.grad, whole)


@pytest.mark.parametrize("rows", [(6,), (2, 3), ()], ids=str)
@pytest.mark.parametrize("needs", range(1, 8))
def test_what_no_gradient_needs_is_not_kept(needs: int, rows: tuple[int, ...]) -> None:
    """An activation beside a frozen weight, a weight beside raw input; the gradients are right."""
    need_x, need_w, need_b = (bool(needs & 1 << i) for i in range(3))
    x, w, b = torch.randn(*rows, 20), torch.randn(18, 20), torch.randn(18)
    leaves = [t.requires_grad_(need) for t, need in ((x, need_x), (w, need_w), (b, need_b))]
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = ops.linear(*leaves)
    assert {t.data_ptr() for t in saved} == {
        t.data_ptr() for t, kept in ((x, need_w), (w, need_x)) if kept
    }
    wanted = [t for t in leaves if t.requires_grad]
    dy = torch.randn_like(y)
    theirs = torch.autograd.grad(F.linear(*leaves), wanted, dy)
    exact = torch.autograd.grad(F.linear(*(t.double() for t in leaves)), wanted, dy.double())
    for got, other, reference in zip(
        torch.autograd.grad(y, wanted, dy), theirs, exact, strict=True
    ):
        assert_no_worse(got, other, reference.double())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(isa: str, dtype: torch.dtype) -> None:
    dy, x, w = (
        torch.randn(9, 18).to(dtype),
        torch.randn(9, 21).to(dtype),
        torch.randn(18, 21).to(dtype),
    )
    backward = torch.ops.pybigmodel.linear_backward
    plain = backward(dy, x, w, 0, True, True, True)
    for (_, dys), (_, xs), (_, ws) in zip(layouts(dy), layouts(x), layouts(w), strict=True):
        for arguments in ((dys, x, w), (dy, xs, w), (dy, x, ws), (dys, xs, ws)):
            for actual, expected in zip(
                backward(*arguments, 0, True, True, True), plain, strict=True
            ):
                assert_exact(actual, expected)


@pytest.mark.parametrize(("m", "n", "k"), [(9, 1, 1), (1, 1, 5), (1, 5, 1), (9, 1, 7), (9, 7, 1)])
def test_strides_of_ones(isa: str, m: int, n: int, k: int) -> None:
    """Where a size is 1, torch's strides mean nothing and a row may look like a column."""
    dy, x, w = torch.randn(m, n), torch.randn(m, k), torch.randn(n, k)
    exact = (dy.double() @ w.double(), dy.double().t() @ x.double(), dy.double().sum(0))
    theirs = (dy @ w, dy.t() @ x, dy.sum(0))
    views = [(dy, x, w), (dy.t().contiguous().t(), x.t().contiguous().t(), w.t().contiguous().t())]
    for arguments in views:
        got = torch.ops.pybigmodel.linear_backward(*arguments, 0, True, True, True)
        for actual, other, reference in zip(got, theirs, exact, strict=True):
            assert_no_worse(actual, other, reference, floor_ulps=8)


def test_expanded_gradient(isa: str) -> None:
    """y.sum().backward() hands over a gradient with strides of 0."""
    x, w = torch.randn(2, 5, 20, requires_grad=True), torch.randn(18, 20, requires_grad=True)
    ops.linear(x, w).sum().backward()
    ones = torch.ones(2, 5, 18)
    expected = torch.ops.pybigmodel.linear_backward(
        ones, x.detach(), w.detach(), 0, True, True, False
    )
    assert_exact(x.grad, expected[0])
    assert_exact(w.grad, expected[1])


@pytest.mark.parametrize(("m", "n", "k"), [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty(isa: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w, b = torch.randn(2, m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    dy = torch.randn(2, m, n).to(dtype)
    for actual, expected in zip(
        gradients(ops.linear, dy, x, w, b), gradients(F.linear, dy, x, w, b), strict=True
    ):
        assert_no_worse(actual, expected, expected.double())


def test_threads_agree(isa: str, threads: None) -> None:
    dy, x, w = torch.randn(300, 260), torch.randn(300, 200), torch.randn(260, 200)
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(torch.ops.pybigmodel.linear_backward(dy, x, w, 0, True, True, True))
    for other in results[1:]:
        for a, b in zip(other, results[0], strict=True):
            assert_exact(a, b)


def test_bias_gradient_of_a_float32_bias() -> None:
    """A bias in fp32 beside bf16 tensors gets its gradient in fp32, not rounded on the way."""
    x, w = torch.randn(50, 20).bfloat16(), torch.randn(18, 20).bfloat16()
    b, dy = torch.randn(18, requires_grad=True), torch.randn(50, 18).bfloat16()
    ops.linear(x, w, b).backward(dy)
    assert b.grad is not None and b.grad.dtype == torch.float32
    assert_no_worse(b.grad, dy.float().sum(0), dy.double().sum(0))
