"""attention of scores and masks at the ends of float32's range, forward and backward."""

from __future__ import annotations

import pytest
import torch
from attention_cases import FLOATS, Case, check_forward, exact, formula
from attention_gradients import gradients, ours, seeds_of

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
