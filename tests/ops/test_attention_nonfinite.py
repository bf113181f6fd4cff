"""attention of NaN, infinity, huge and tiny numbers: as the formula has it, and no further."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import FLOATS, Case, check_forward, exact, make, theirs
from torch import Tensor

from pybigmodel import ops
from pybigmodel.testing import assert_exact, assert_no_worse

SQ, SK, D = 70, 100, 40
SHAPE = (2, 2, 1, SQ, SK, D, 24)


def both(case: Case) -> tuple[Tensor, Tensor]:
    out, lse = case.call(ops.attention, return_lse=True)
    return out, lse


def spoiled(name: str, at: tuple[int, ...], bad: float, case: Case) -> Case:
    tensors = {"q": case.q.clone(), "k": case.k.clone(), "v": case.v.clone()}
    tensors[name][at] = bad
    return Case(*tensors.values(), case.options)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bad_query_spoils_its_row_only(isa: str, dtype: torch.dtype, bad: float) -> None:
    case = make({"shape": SHAPE, "dtype": dtype})
    clean, sums = both(case)
    for row, column in [(0, 0), (5, D - 1), (47, 17), (SQ - 1, 31)]:
        out, lse = both(spoiled("q", (1, 1, row, column), bad, case))
        # Scores of ±∞, of both signs among so many keys: ∞ − ∞.
        assert out[1, 1, row].isnan().all() and not lse[1, 1, row].isfinite()
        out[1, 1, row], lse[1, 1, row] = clean[1, 1, row], sums[1, 1, row]
        assert_exact(out, clean)
        assert_exact(lse, sums)


@pytest.mark.parametrize("hide", [{"causal": True}, {"window": (9, 3)}, {"attn_mask": True}])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bad_key_spoils_the_rows_that_see_it(
    isa: str, dtype: torch.dtype, hide: dict[str, Any]
) -> None:
    case = make({"shape": SHAPE, "dtype": dtype})
    case.options = {"attn_mask": torch.rand(SQ, SK) > 0.5} if "attn_mask" in hide else hide
    clean, sums = both(case)
    for at in (35, 64, SK - 1):
        bad = spoiled("k", (0, 0, at, 3), torch.nan, case)
        out, lse = both(bad)
        sees = exact(bad)[1].isnan()
        assert sees[0].any() and not sees[0].all() and not sees[1].any()
        assert out[sees].isnan().all() and lse[sees].isnan().all()
        if "attn_mask" in hide:  # NaN − ∞ is NaN, as in torch's path; or the tile was skipped
            sees = out[..., :1].isnan().any(-1)
            assert not sees[1].any()
        assert_exact(out[~sees], clean[~sees])
        assert_exact(lse[~sees], sums[~sees])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("hide", [{}, {"causal": True}, {"attn_mask": True}])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bad_value_spoils_its_column(
    isa: str, dtype: torch.dtype, hide: dict[str, Any], bad: float
) -> None:
    case = make({"shape": SHAPE, "dtype": dtype})
    case.options = {"attn_mask": torch.rand(SQ, SK) > 0.5} if "attn_mask" in hide else hide
    clean, sums = both(case)
    for at, column in [(0, 0), (33, 7), (SK - 1, 23)]:
        k = case.k.clone()
        k[0, 0, at] = torch.nan
        sees = exact(Case(case.q, k, case.v, case.options))[1].isnan()
        out, lse = both(spoiled("v", (0, 0, at, column), bad, case))
        assert_exact(lse, sums)
        spoilt = torch.zeros_like(clean, dtype=torch.bool)
        spoilt[..., column] = sees
        assert_exact(out[spoilt], torch.full_like(out[spoilt], bad))
        # Where the key is hidden its weight is 0, and 0·∞ is NaN in torch's path; or it is not met.
        hidden = torch.zeros_like(spoilt)
        hidden[0, :, :, column] = ~sees[0]
        assert (out[hidden].isnan() | (out[hidden] == clean[hidden])).all()
        assert_exact(out[~spoilt & ~hidden], clean[~spoilt & ~hidden])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_infinite_scores(isa: str, dtype: torch.dtype) -> None:
    """A score of −∞ hides its key; one of +∞ leaves a row of NaN; only −∞ leave zeros."""
    case = make({"shape": (1, 2, 2, 9, 70, 16, 16), "dtype": dtype})
    q, k, v = case.q.abs() + 0.1, case.k, case.v
    k[:, :, 5, 2] = -torch.inf
    case = Case(q, k, v)
    out, lse = both(case)
    check_forward(case, out, lse)
    assert out.isfinite().all()
    removed = exact(Case(q, k, v, {"attn_mask": torch.arange(70) != 5}))
    assert_no_worse(out, theirs(case), removed[0])
    k[0, 1, :, 2] = -torch.inf
    out, lse = both(case)
    assert (out[0, 1] == 0).all() and (lse[0, 1] == -torch.inf).all()
    k[0, 0, 69, 2] = torch.inf
    out, lse = both(case)
    assert out[0, 0].isnan().all() and not lse[0, 0].isfinite().any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_bad_mask_spoils_its_row_only(isa: str, dtype: torch.dtype, bad: float) -> None:
    case = make({"shape": SHAPE, "dtype": dtype, "mask": "float32"})
    clean, sums = both(case)
    case.options["attn_mask"][0, 1, 33, 77] = bad
    out, lse = both(case)
    assert out[0, 1, 33].isnan().all() and not lse[0, 1, 33].isfinite()
    out[0, 1, 33], lse[0, 1, 33] = clean[0, 1, 33], sums[0, 1, 33]
    assert_exact(out, clean)
    assert_exact(lse, sums)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"softcap": 5.0}], ids=str)
def test_huge_scores(isa: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Thousands apart: weights of one key and of none; growing ones move every block's maximum.

    The result is what the rounding of a few scores makes of it: twice the policy's factor.
    """
    for growth in (1.0, -1.0, 0.0):
        case = make({"shape": (1, 4, 4, 70, 600, 32, 16), "dtype": dtype})
        steps = torch.linspace(1, 60, 600)[:, None]
        k = case.k * (steps if growth > 0 else steps.flip(0) if growth < 0 else 60.0)
        case = Case(case.q * 4, k.to(dtype), case.v, options)
        check_forward(case, *both(case), luck=2)
    # Every score above what e^x can hold, and every one below.
    for level in (3e4, -3e4):
        q, k = torch.full((1, 1, 7, 16), 100.0), torch.full((1, 1, 600, 16), level / 400)
        k += torch.randn_like(k) / 256
        case = Case(q.to(dtype), k.to(dtype), torch.randn(1, 1, 600, 8).to(dtype))
        check_forward(case, *both(case), luck=2)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tiny_scores(isa: str, dtype: torch.dtype) -> None:
    """Scores far below one: the mean of the values, and lse the logarithm of their number."""
    case = make({"shape": (2, 2, 2, 20, 300, 32, 32), "dtype": dtype})
    tiny = Case(case.q * 1e-4, case.k * 1e-4, case.v)
    check_forward(tiny, *both(tiny))
    zero = Case(case.q * 0, case.k, case.v)
    out, lse = both(zero)
    check_forward(zero, out, lse)
    torch.testing.assert_close(lse, torch.full_like(lse, 300).log(), rtol=1e-6, atol=0)


def test_subnormal_inputs(isa: str) -> None:
    """Subnormal queries and keys are as good as zeros; subnormal values are kept in fp32."""
    q, k, v = (torch.randn(1, 2, n, 16) for n in (5, 50, 50))
    out = ops.attention(q * 1e-39, k, v)
    torch.testing.assert_close(out, ops.attention(q * 0, k, v), rtol=1e-6, atol=1e-7)
    out = ops.attention(q, k, v * 1e-39)
    expected, _ = exact(Case(q, k, v * 1e-39))
    assert ((out.double() - expected).abs() <= 50 * 2.0**-149).all()


def test_flushed_subnormals(isa: str) -> None:
    """torch.set_flush_denormal changes the FPU's mode under the kernels' feet: they stay right."""
    case = make({"shape": (1, 2, 2, 20, 300, 32, 32), "dtype": torch.float32})
    case.q *= 20  # weights down to e^−100 and below
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        out, lse = both(case)
    finally:
        torch.set_flush_denormal(False)
    check_forward(case, out, lse)


def test_large_values_overflow_only_where_the_result_does(isa: str) -> None:
    """A weighted mean of values lies between them: no sum on the way may leave the range."""
    q, k = torch.randn(1, 1, 5, 16), torch.randn(1, 1, 300, 16)
    v = torch.full((1, 1, 300, 8), 60000.0).half()
    out = ops.attention(q.half(), k.half(), v)
    torch.testing.assert_close(out, torch.full_like(out, 60000.0), rtol=2e-3, atol=0)
    v = torch.full((1, 1, 300, 8), 1e36)
    out = ops.attention(q, k, v)
    torch.testing.assert_close(out, torch.full_like(out, 1e36), rtol=1e-5, atol=0)
