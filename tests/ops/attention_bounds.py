"""How far attention may be off at worst: every error at its bound, and all of one sign."""

from __future__ import annotations

import torch
from attention_cases import Case, exact
from torch import Tensor

from pybigmodel.reference import attention as reference
from pybigmodel.testing import assert_exact


def bounds(case: Case, bf16: bool) -> tuple[Tensor, Tensor]:
    """How far output and lse may be off: (B, H, Sq, Dv) and (B, H, Sq)."""
    c, o, ulp = case.to(torch.float64), case.options, 2.0**-23
    group = c.q.shape[1] // c.k.shape[1]
    k = c.k.repeat_interleave(group, 1)
    d, sk = c.q.shape[-1], k.shape[-2]
    scale = d**-0.5 if o["scale"] is None else abs(o["scale"])
    products = scale * (c.q.abs() @ k.abs().mT)
    sizes = (d + 8) * products + 8 * o["softcap"]
    mask, slopes = o["attn_mask"], o["alibi_slopes"]
    if slopes is not None:
        distance = reference.distances(c.q.shape[2], sk, o["causal_align"]).abs()
        sizes = sizes + 8 * slopes.double().abs()[..., None, None] * distance
    if mask is not None and mask.dtype != torch.bool:
        sizes = sizes + 8 * mask.double().abs().masked_fill(mask == -torch.inf, 0)
    score = ulp * (sizes.amax(-1) if sk else sizes.sum(-1))
    lse = score + (4e-6 if bf16 else 4e-7) + (sk + 16) * ulp
    weighted, sums = reference.attention(c.q, c.k, c.v.abs(), **c.options)
    lse = lse + 4 * ulp * sums.masked_fill(sums.isinf(), 0).abs()
    roundings = 2 if o.get("dropout_p") else 1  # of a weight: dropout rounds it again
    relative = torch.expm1(2 * lse) + (roundings * 2.0**-8 if bf16 else 0.0)
    return relative[..., None] * weighted, lse


def check(case: Case, out: Tensor, lse: Tensor, bf16: bool) -> None:
    expected, sums = exact(case)
    assert out.shape == expected.shape and lse.shape == sums.shape and lse.dtype == torch.float32
    empty = sums == -torch.inf
    assert_exact(lse == -torch.inf, empty)
    assert (out[empty] == 0).all()
    of_out, of_lse = bounds(case, bf16)
    finfo = torch.finfo(out.dtype)
    of_out = of_out + finfo.eps * expected.abs() + finfo.smallest_normal
    assert ((out.double() - expected).abs() <= of_out).all()
    assert ((lse.double() - sums).abs() <= of_lse)[~empty].all()
