"""Gradients of attention: of q, k, v, the mask and through lse, against float64 autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from attention_cases import (
    FLOATS,
    Case,
    exact,
    formula,
    layouts,
    make,
    matrix,
    name_of,
    some_hidden,
    theirs,
)
from attention_gradients import Result, check_gradients, gradients, ours, seeds_of
from torch import Tensor
from torch.autograd import forward_ad

from pybigmodel import _native, ops
from pybigmodel.testing import assert_exact, assert_no_worse

MATRIX = matrix(through_lse=[False, True])
F32 = torch.float32


@pytest.mark.parametrize("choice", MATRIX, ids=map(name_of, MATRIX))
def test_matrix(isa: str, choice: dict[str, Any]) -> None:
    check_gradients(make(choice), choice["through_lse"])
    assert _native.last_kernel().endswith(f".{isa}")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_head_dimensions(isa: str, dtype: torch.dtype) -> None:
    for d in (1, 2, 3, 15, 16, 17, 31, 32, 33, 47, 63, 64, 65, 100, 127, 128, 129, 192, 255, 256):
        check_gradients(make({"shape": (1, 4, 2, 33, 40, d, 257 - d), "dtype": dtype}))


@pytest.mark.parametrize("causal", [None, "bottom_right"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_lengths(isa: str, dtype: torch.dtype, causal: str | None) -> None:
    for sq, sk in [(1, 64), (2, 300), (31, 32), (47, 49), (63, 65), (97, 15), (130, 257), (9, 700)]:
        shape = (4, 4, 2, sq, sk, 24, 20)
        check_gradients(make({"shape": shape, "dtype": dtype, "causal": causal}), through_lse=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_in_bf16(isa: str, dtype: torch.dtype) -> None:
    """precision="bf16": no worse than torch in bf16, and other than without; "fp32" is as None."""
    case = make({"shape": (2, 4, 2, 65, 130, 64, 48), "dtype": dtype, "mask": "float32"})
    seeds = seeds_of(case)
    expected = gradients(exact, case.to(torch.float64), seeds)
    rounded = Case(case.q.bfloat16(), case.k.bfloat16(), case.v.bfloat16(), case.options)
    others = gradients(lambda c: (theirs(c), None), rounded, seeds)
    plain = gradients(ours, case, seeds)
    case.options["precision"] = "fp32"
    for got, other in zip(gradients(ours, case, seeds), plain, strict=True):
        assert_exact(got, other)
    case.options["precision"] = "bf16"
    for got, other, wide, reference in zip(
        gradients(ours, case, seeds), others, plain, expected, strict=True
    ):
        assert_no_worse(got, other.to(got.dtype), reference)
        assert (got != wide).any()


MASKS = [(), (37,), (1,), (7, 1), (1, 37), (7, 37), (4, 1, 1), (4, 7, 37), (2, 1, 1, 37)]
MASKS += [(2, 1, 7, 1), (2, 4, 1, 1), (2, 4, 1, 37), (2, 1, 7, 37), (1, 4, 7, 37), (2, 4, 7, 37)]


@pytest.mark.parametrize("kind", ["float32", "dtype"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_broadcast_of_the_mask(isa: str, dtype: torch.dtype, kind: str) -> None:
    """The gradient has the mask's shape: it is the sum over what was broadcast."""
    case = make({"shape": (2, 4, 2, 7, 37, 16, 16), "dtype": dtype})
    for shape in MASKS:
        case.options["attn_mask"] = torch.randn(shape).to(dtype if kind == "dtype" else F32)
        check_gradients(case, True, "mask")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_layouts_of_the_mask(isa: str, dtype: torch.dtype) -> None:
    """Strided, expanded and transposed masks: to the bit the gradient of the contiguous one."""
    case = make({"shape": (2, 3, 3, 9, 21, 16, 16), "dtype": dtype, "mask": "float32"})
    mask, seeds = case.options["attn_mask"], seeds_of(case, through_lse=True)
    plain = gradients(ours, case, seeds)
    for kind, m in layouts(mask):
        case.options["attn_mask"] = m
        for got, expected in zip(gradients(ours, case, seeds), plain, strict=True):
            assert torch.equal(got, expected), kind
    for shape in ((1, 1, 9, 21), (2, 1, 1, 21), (1, 3, 9, 1), (1, 1, 1, 1)):
        whole = torch.randn(shape).expand(mask.shape)
        case.options["attn_mask"] = whole.contiguous()
        plain = gradients(ours, case, seeds)
        case.options["attn_mask"] = whole
        for got, expected in zip(gradients(ours, case, seeds), plain, strict=True):
            assert_exact(got, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(isa: str, dtype: torch.dtype) -> None:
    """The layout of no tensor changes one bit, nor does that of the output's gradient."""
    case = make({"shape": (2, 4, 4, 17, 33, 20, 20), "dtype": dtype, "causal": "bottom_right"})
    d_out, d_lse = seeds_of(case, through_lse=True)
    assert d_lse is not None
    plain = gradients(ours, case, (d_out, d_lse))
    strided_lse = torch.stack([d_lse, d_lse + 1], -1)[..., 0]
    for (kind, q), (_, k), (_, v), (_, d) in zip(
        *(layouts(t) for t in (case.q, case.k, case.v, d_out)), strict=True
    ):
        for one, seeds in (
            (Case(q, k, v, case.options), (d_out, d_lse)),
            (case, (d, strided_lse)),
            (Case(q, case.k, v, case.options), (d, d_lse)),
        ):
            for got, expected in zip(gradients(ours, one, seeds), plain, strict=True):
                assert torch.equal(got, expected), kind


def test_expanded_gradient(isa: str) -> None:
    """out.sum().backward() hands over a gradient with strides of 0."""
    case = make({"shape": (2, 2, 1, 9, 21, 16, 24), "dtype": F32})
    leaves, wanted = case.leaves()
    out, lse = ours(leaves)
    got = torch.autograd.grad(out.sum() + lse.sum(), wanted)
    ones = torch.ones(2, 2, 9, 24), torch.ones(2, 2, 9)
    for a, b in zip(got, gradients(ours, case, ones), strict=True):
        assert_exact(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_through_lse_alone(isa: str, dtype: torch.dtype) -> None:
    """With no gradient of the output: dq = scale·Σ p·k, and v has none."""
    case = make({"shape": (2, 4, 2, 33, 70, 32, 24), "dtype": dtype, "mask": "float32"})
    d_lse = torch.randn(2, 4, 33)

    def run(f: Callable[[Case], Result], case: Case) -> tuple[Tensor, ...]:
        case, leaves = case.leaves()
        _, lse = f(case)
        assert lse is not None
        return torch.autograd.grad(lse, leaves, d_lse.to(lse.dtype), materialize_grads=True)

    got, others, expected = run(ours, case), run(formula, case), run(exact, case.to(torch.float64))
    for a, b, e in zip(got, others, expected, strict=True):
        assert_no_worse(a, b, e)
    assert (got[2] == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_that_see_nothing(isa: str, dtype: torch.dtype) -> None:
    """Their gradients are zero and never NaN, and they add nothing to those of k, v and mask."""
    sq, sk = 70, 40
    hidden = ~some_hidden(sq, sk)
    minus = torch.zeros(sq, sk).masked_fill(hidden, -torch.inf)
    for options in (
        {"attn_mask": ~hidden},
        {"attn_mask": minus.to(dtype)},
        {"attn_mask": minus + torch.randn(sq, sk), "softcap": 2.0},
        {"causal": True},
        {"window": (3, 3), "causal_align": "top_left"},
        {"attn_mask": torch.zeros(1, 2, sq, sk).index_fill(1, torch.tensor([1]), -torch.inf)},
    ):
        case = make({"shape": (2, 2, 2, sq, sk, 20, 20), "dtype": dtype})
        case.options = options
        empty = exact(case)[1] == -torch.inf
        assert empty.any()
        for through_lse in (False, True):
            check_gradients(case, through_lse)
            d_q, *_, last = gradients(ours, case, seeds_of(case, through_lse))
            assert (d_q[empty] == 0).all() and last.isfinite().all()
        # Gradients of rows that see nothing may be anything: nothing comes of them.
        d_out, d_lse = seeds_of(case, through_lse=True)
        assert d_lse is not None
        plain = gradients(ours, case, (d_out, d_lse * ~empty))
        loud = d_out.masked_fill(empty[..., None], 1e4)
        leaves, wanted = case.leaves()
        got = torch.autograd.grad(ours(leaves), wanted, (loud, d_lse.masked_fill(empty, 1e30)))
        for a, b in zip(got, plain, strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape", [(0, 2, 1, 3, 4, 8, 8), (2, 2, 1, 0, 4, 8, 8), (2, 2, 1, 3, 0, 8, 5)]
)
def test_empty(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    case = make({"shape": shape, "dtype": dtype, "mask": "float32"})
    for through_lse in (False, True):
        got = gradients(ours, case, seeds_of(case, through_lse))
        for gradient, tensor in zip(got, case.tensors().values(), strict=True):
            assert_exact(gradient, torch.zeros_like(tensor))


@pytest.mark.parametrize("names", ["q", "k", "v", "mask", "q v", "k mask"])
def test_only_the_gradients_that_are_asked_for(isa: str, names: str) -> None:
    """To the bit those of a call that asks for all; the others stay None."""
    case = make({"shape": (2, 4, 2, 20, 40, 16, 24), "dtype": F32, "mask": "float32"})
    seeds = seeds_of(case, through_lse=True)
    whole = dict(zip(case.tensors(), gradients(ours, case, seeds), strict=True))
    for name, got in zip(names.split(), gradients(ours, case, seeds, *names.split()), strict=True):
        assert_exact(got, whole[name])
    leaves, _ = case.leaves(*names.split())
    out, lse = ours(leaves)
    torch.autograd.backward([out, lse], seeds)
    for name, tensor in leaves.tensors().items():
        assert (tensor.grad is not None) == (name in names.split())


def test_nothing_is_recorded_where_nothing_requires_grad() -> None:
    case = make({"shape": (1, 2, 2, 5, 6, 8, 8), "dtype": F32, "mask": "float32"})
    out, lse = ours(case)
    assert out.grad_fn is None and lse is not None and lse.grad_fn is None
    leaves, _ = case.leaves()
    with torch.no_grad():
        assert ours(leaves)[0].grad_fn is None
    assert ours(leaves)[0].grad_fn is not None


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (50, 3)},
    "much": {"alibi_slopes": torch.rand(4), "softcap": 3.0, "dropout_p": 0.2, "dropout_seed": 3},
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_repeats_agree_to_the_bit(
    isa: str, threads: None, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """With several threads too; what a second thread sums apart stays within the policy."""
    for shape in [(1, 4, 1, 130, 500, 32, 32), (3, 4, 4, 20, 64, 16, 24)]:
        case = make({"shape": shape, "dtype": dtype, "mask": "float32"})
        case.options |= options
        seeds = seeds_of(case, through_lse=True)
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            first = gradients(ours, case, seeds)
            for got, expected in zip(gradients(ours, case, seeds), first, strict=True):
                assert_exact(got, expected)
        check_gradients(case, through_lse=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dropout_is_that_of_the_forward_pass(isa: str, dtype: torch.dtype) -> None:
    """d_v of unit gradients are the kept weights themselves; a drawn seed is kept for backward."""
    b, h, sq, sk = 2, 3, 40, 70
    q, k = torch.randn(b, h, sq, 16).to(dtype), torch.randn(b, h, sk, 16).to(dtype)
    v = torch.eye(sk, dtype=dtype).expand(b, h, sk, sk).clone().requires_grad_()
    for seed in (5, 2**40 + 6, None):
        weights = ops.attention(q, k, v, dropout_p=0.4, dropout_seed=seed)
        eye = torch.eye(sq, sk, dtype=dtype).expand(b, h, sq, sk)
        (d_v,) = torch.autograd.grad(weights, v, eye)
        assert_exact(d_v[..., :sq].mT != 0, weights != 0)
        if seed is not None:
            case = Case(q, k, torch.randn(b, h, sk, 24).to(dtype))
            case.options = {"dropout_p": 0.4, "dropout_seed": seed}
            check_gradients(case, through_lse=True)


def test_all_dropped() -> None:
    case = make({"shape": (1, 2, 2, 9, 20, 16, 16), "dtype": F32})
    case.options = {"dropout_p": 1.0, "dropout_seed": 5}
    for got in gradients(ours, case, seeds_of(case)):
        assert (got == 0).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_huge_scores(isa: str, dtype: torch.dtype) -> None:
    """Weights of one key and of none: finite gradients, as exact as torch's."""
    case = make({"shape": (2, 4, 2, 40, 300, 16, 16), "dtype": dtype})
    loud = Case(case.q * 20, case.k * 20, case.v, {"causal": True})
    check_gradients(loud, through_lse=True)
    check_gradients(Case(case.q * 3, case.k * 3, case.v, {"causal": True}), through_lse=True)


def test_second_gradient_is_refused() -> None:
    case, (q, k, _) = make({"shape": (1, 2, 2, 5, 6, 8, 8), "dtype": F32}).leaves()
    for result in ours(case):
        (d_q,) = torch.autograd.grad(result.square().sum(), q, create_graph=True)  # type: ignore[union-attr]
        with pytest.raises(RuntimeError, match=r"attention.*gradient of its gradient"):
            torch.autograd.grad(d_q.sum(), k)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("name", ["q", "k", "v", "mask"])
def test_forward_mode_is_refused(name: str) -> None:
    case = make({"shape": (1, 2, 2, 5, 6, 8, 8), "dtype": F32, "mask": "float32"})
    with forward_ad.dual_level():
        dual = {
            n: forward_ad.make_dual(t, torch.ones_like(t)) if n == name else t
            for n, t in case.tensors().items()
        }
        mask = dual.pop("mask")
        shown = "attn_mask" if name == "mask" else name
        with pytest.raises(NotImplementedError, match=f"attention: {shown} is a dual tensor"):
            ops.attention(**dual, attn_mask=mask)


def test_slopes_have_no_gradient() -> None:
    q = torch.randn(1, 2, 5, 8)
    slopes = torch.rand(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="attention: alibi_slopes requires grad"):
        ops.attention(q, q, q, alibi_slopes=slopes)
    with torch.no_grad():
        ops.attention(q, q, q, alibi_slopes=slopes)
