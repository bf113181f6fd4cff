"""attention of scores and masks at the ends of float32's range, forward and backward."""

from __future__ import annotations

import pytest
import torch
from attention_cases import FLOATS, Case, check_forward, exact, formula
from attention_gradients import gradients, ours, seeds_of
from torch import Tensor

from pybigmodel import ops
from pybigmodel.testing import assert_exact, assert_no_worse

# Powers of two about where exponents are computed in another way, and far beyond.
LEVELS = [2.0**n for n in (21, 22, 24, 40, 120)]


def stairs(level: float, dtype: torch.dtype, queries: int, rising: bool) -> Case:
    """Scores level·(64 − n)/64 with n = 3 .. 0, exact in every dtype: sums have one term.

    What a row sees of the largest has all of the weight, in parts that are the same to the bit.
    """
    keys = 600
    steps = torch.arange(keys) * 4 // keys
    k = torch.zeros(1, 1, keys, 16)
    k[..., 0] = (61 + (steps if rising else 3 - steps)) / 64
    q = torch.zeros(1, 2, queries, 16)
    q[..., 0] = level
    q[:, 1] *= -1
    q[:, :, ::3] /= 2.0**20  # neighbours whose scores are small
    v = torch.randn(1, 1, keys, 24)
    return Case(q.to(dtype), k.to(dtype), v.to(dtype), {"scale": 1.0, "causal": True})


@pytest.mark.parametrize("queries", [3, 70])  # by way of the kernel for few rows, and not
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_of_any_size(isa: str, dtype: torch.dtype, plain: bool, queries: int) -> None:
    for level in LEVELS:
        for rising in (True, False):
            case = stairs(level, dtype, queries, rising)
            if not plain:
                case.options["attn_mask"] = torch.ones(600, dtype=torch.bool)
            out, lse = case.call(ops.attention, return_lse=True)
            check_forward(case, out, lse)
            seeds = seeds_of(case, through_lse=True)
            got = gradients(ours, case, seeds, "k", "v")
            expected = gradients(exact, case.to(torch.float64), seeds, "k", "v")
            others = gradients(formula, case, seeds, "k", "v")
            for a, b, e in zip(got, others, expected, strict=True):
                assert_no_worse(a, b, e)


@pytest.mark.parametrize("queries", [3, 70])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_whose_mask_is_the_lowest_number(isa: str, dtype: torch.dtype, queries: int) -> None:
    """As torch has it: what is added to the lowest number is lost, so all keys weigh the same."""
    q, k, v = (torch.randn(1, 2, n, 16).to(dtype) for n in (queries, 300, 300))
    for mask_dtype in {dtype, torch.float32} - {torch.float16}:
        mask = torch.full((queries, 300), torch.finfo(mask_dtype).min, dtype=mask_dtype)
        out, lse = ops.attention(q, k, v, attn_mask=mask, return_lse=True)
        mean = v.float().mean(2, keepdim=True).expand(out.shape)
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(out.float(), mean, rtol=2 * eps, atol=4 * eps)
        assert_exact(lse, torch.full_like(lse, torch.finfo(mask_dtype).min))
        # One key that is not hidden has all the weight, as one at the highest number has.
        for value in (0.0, torch.finfo(mask_dtype).max):
            mask[:, 77] = value
            out = ops.attention(q, k, v, attn_mask=mask)
            one = v[:, :, 77:78].expand(out.shape)
            torch.testing.assert_close(out, one, rtol=2 * eps, atol=0)


@pytest.mark.parametrize("far", [2**40, 2**62, 2**63 - 1])
def test_windows_beyond_every_sequence(isa: str, far: int) -> None:
    q, k, v = (torch.randn(1, 2, n, 8).requires_grad_() for n in (5, 90, 90))

    def run(window: tuple[int, int] | None) -> list[Tensor]:
        out = ops.attention(q, k, v, window=window)
        return [out, *torch.autograd.grad(out.sum(), (q, k, v))]

    for window, same in (((-1, far), None), ((far, far), None), ((far, 3), (-1, 3))):
        for got, expected in zip(run(window), run(same), strict=True):
            assert_exact(got, expected)
    lengths = torch.tensor([90], dtype=torch.int32)
    with torch.no_grad():
        got, expected = (ops.attention_decode(q, k, v, lengths, window=w) for w in ((far, 0), None))
    assert_exact(got, expected)


@pytest.mark.parametrize("softcap", [1e-30, 1e30])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e38])
def test_caps_and_scales_at_their_bounds(isa: str, scale: float, softcap: float) -> None:
    q = torch.randn(1, 1, 20, 8)
    q[:, :, 7] = 0  # 0·∞ would be NaN
    case = Case(q, torch.randn(1, 1, 40, 8), torch.randn(1, 1, 40, 8))
    case.options = {"softcap": softcap, "scale": scale}
    if scale * 10 < softcap * 1e6:  # else scores are far apart, and a few roundings decide
        check_forward(case, *case.call(ops.attention, return_lse=True))
    else:
        out = case.call(ops.attention)
        assert out.isfinite().all()
        torch.testing.assert_close(out[:, :, 7], case.v.mean(2), rtol=1e-5, atol=1e-6)


# --- what is hidden has no part in gradients ------------------------------------------------------

SQ, SK = 150, 220
HIDDEN = {
    "causal": ({"causal": True, "causal_align": "top_left"}, SQ + 20),
    "window": ({"window": (None, 10), "causal_align": "top_left"}, SQ + 50),
    "bool mask": ({"attn_mask": torch.arange(SK) < 200}, 210),
    "float mask": (
        {"attn_mask": torch.zeros(SK).index_fill(0, torch.arange(200, SK), -torch.inf)},
        219,
    ),
    "hole": ({"attn_mask": torch.arange(SK) != 40}, 40),
    "softcap": ({"attn_mask": torch.arange(SK) < 200, "softcap": 3.0}, 210),
    "dropout": (
        {"causal": True, "causal_align": "top_left", "dropout_p": 0.3, "dropout_seed": 1},
        219,
    ),
}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("hide", HIDDEN)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_hidden_keys_that_are_not_finite(
    isa: str, dtype: torch.dtype, hide: str, bad: float
) -> None:
    """Gradients to the bit those of a call that has zeros there."""
    options, at = HIDDEN[hide]
    q, k, v = (torch.randn(1, 2, n, 24).to(dtype) for n in (SQ, SK, SK))
    seeds = seeds_of(Case(q, k, v), through_lse=True)
    k[:, :, at], v[:, :, at] = 0, 0
    expected = gradients(ours, Case(q, k, v, options), seeds, "q", "k", "v")
    assert all(g.isfinite().all() for g in expected)
    spoilt_k, spoilt_v = k.clone(), v.clone()
    spoilt_k[:, :, at, 3] = bad
    if hide != "hole":  # whose weight is 0, and 0·NaN is NaN in the output already
        spoilt_v[:, :, at, 5] = bad
    got = gradients(ours, Case(q, spoilt_k, spoilt_v, options), seeds, "q", "k", "v")
    for a, b in zip(got, expected, strict=True):
        assert_exact(a, b)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bad_key_spoils_gradients_of_the_rows_that_see_it(
    isa: str, dtype: torch.dtype, bad: float
) -> None:
    q, k, v = (torch.randn(1, 2, n, 24).to(dtype) for n in (SQ, SK, SK))
    options = {"causal": True, "causal_align": "top_left"}
    seeds = seeds_of(Case(q, k, v))
    clean = gradients(ours, Case(q, k, v, options), seeds, "q")[0]
    for name, at in (("k", 96), ("v", 96)):
        tensors = {"k": k.clone(), "v": v.clone()}
        tensors[name][0, 1, at] = bad
        (d_q,) = gradients(ours, Case(q, tensors["k"], tensors["v"], options), seeds, "q")
        assert_exact(d_q[0, 0], clean[0, 0])
        assert_exact(d_q[0, 1, :at], clean[0, 1, :at])
        assert not d_q[0, 1, at:].isfinite().any()


@pytest.mark.parametrize("loud", [3e38, torch.inf, torch.nan])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_loud_gradients_of_rows_that_see_nothing(isa: str, dtype: torch.dtype, loud: float) -> None:
    """Nothing comes of them, nor of their queries."""
    q, k, v = (torch.randn(1, 2, n, 24).to(dtype) for n in (SQ, 70, 70))
    blind = slice(3, None, 7)
    mask = torch.randn(SQ, 70)
    mask[blind] = -torch.inf
    case = Case(q, k, v, {"attn_mask": mask})
    d_out, d_lse = seeds_of(case, through_lse=True)
    d_out[:, :, blind], q[:, :, blind] = 0, 0
    expected = gradients(ours, case, (d_out, d_lse))
    d_out[:, :, blind] = loud
    for query in (0, torch.nan):
        q[:, :, blind] = query
        for a, b in zip(gradients(ours, case, (d_out, d_lse)), expected, strict=True):
            assert_exact(a, b)
