"""Random calls of attention: every tier against float64, options and layouts as they fall.

The tolerance is a worst case (every error at its bound and of one sign), so that a failure is a
wrong index and never bad luck; for gradients it is many standard deviations of their rounding.
"""

from __future__ import annotations

from typing import Any

import torch
from attention_bounds import check
from attention_cases import Case, exact
from attention_gradients import assert_within, gradients, noise, ours, seeds_of
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import tensors
from torch import Tensor

from pybigmodel import ops
from pybigmodel.testing import available_isas, force_isa

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
LENGTHS = st.one_of(
    st.integers(0, 9), st.integers(10, 140), st.sampled_from([255, 256, 257, 300, 513, 700])
)
WIDTHS = st.one_of(st.integers(1, 9), st.integers(10, 80), st.sampled_from([127, 128, 200, 256]))
SIDES = st.one_of(st.none(), st.just(-1), st.integers(0, 9), st.integers(10, 300))
SEEDS = st.integers(-(2**63), 2**63 - 1)


@st.composite
def masks(draw: st.DrawFn, whole: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
    """None, or of any kind and broadcast shape; some with rows that see nothing."""
    kind = draw(st.sampled_from(["none", "bool", "float32", "dtype", "infinite"]))
    if kind == "none":
        return None
    shape = [1 if draw(st.booleans()) else n for n in whole][draw(st.integers(0, 4)) :]
    mask = draw(tensors(shape, dtype if kind == "dtype" else torch.float32))
    if kind == "bool":
        return mask > draw(st.sampled_from([-1.0, 0.0, 2.0, 9.0]))
    if kind == "infinite":
        return mask.masked_fill(mask < draw(st.sampled_from([-1.0, 0.0, 2.0])), -torch.inf)
    return mask


@st.composite
def options(draw: st.DrawFn, batch: int, heads: int) -> dict[str, Any]:
    """All of them but the mask; each absent half of the time."""
    slopes = draw(st.sampled_from([None, (heads,), (batch, heads)]))
    given = {
        "causal": draw(st.booleans()),
        "causal_align": draw(st.sampled_from(["bottom_right", "top_left"])),
        "window": draw(st.one_of(st.none(), st.tuples(SIDES, SIDES))),
        "alibi_slopes": None if slopes is None else draw(tensors(list(slopes), torch.float32)),
        "softcap": draw(st.sampled_from([0.0, 0.0, 1.0, 30.0])),
        "scale": draw(st.sampled_from([None, None, 0.0, 0.3, -0.1])),
    }
    if draw(st.booleans()):
        given |= {"dropout_p": draw(st.sampled_from([0.1, 0.5, 1.0])), "dropout_seed": draw(SEEDS)}
    return given


@st.composite
def calls(draw: st.DrawFn, fewest: int = 0) -> Case:
    batch, group, kv = (
        draw(st.integers(fewest, 3)),
        draw(st.integers(1, 4)),
        draw(st.integers(1, 3)),
    )
    sq, sk = (
        draw(LENGTHS.filter(lambda n: n >= fewest)),
        draw(LENGTHS.filter(lambda n: n >= fewest)),
    )
    d, dv, dtype = draw(WIDTHS), draw(WIDTHS), draw(DTYPES)
    q = draw(tensors([batch, kv * group, sq, d], dtype))
    k, v = draw(tensors([batch, kv, sk, d], dtype)), draw(tensors([batch, kv, sk, dv], dtype))
    given = draw(options(batch, kv * group))
    given["attn_mask"] = draw(masks((batch, kv * group, sq, sk), dtype))
    return Case(q, k, v, given)


@given(calls(), st.sampled_from([None, None, "bf16"]))
def test_attention(case: Case, precision: str | None) -> None:
    dtype = case.q.dtype
    bf16 = precision == "bf16" or dtype == torch.bfloat16
    rounded = Case(*(t.bfloat16().to(dtype) for t in (case.q, case.k, case.v)), case.options)
    for isa in available_isas():
        with force_isa(isa):
            out, lse = case.call(ops.attention, return_lse=True, precision=precision)
        assert out.dtype == dtype
        check(rounded if precision else case, out, lse, bf16)


@given(calls(fewest=1), st.booleans(), st.integers(0, 2**31))
def test_gradients(case: Case, through_lse: bool, seed: int) -> None:
    # Of equal keys or values every addition rounds the same way, and errors are not independent.
    assume(case.k.shape[2] == 1 or (case.k.stride(2) and case.v.stride(2)))
    torch.manual_seed(seed)
    seeds = seeds_of(case, through_lse)
    expected = gradients(exact, case.to(torch.float64), seeds)
    sigmas = noise(case, *seeds)
    for isa in available_isas():
        with force_isa(isa):
            got = gradients(ours, case, seeds)
        for name, a, e, sigma in zip(case.tensors(), got, expected, sigmas, strict=True):
            assert a.shape == e.shape and a.dtype == case.tensors()[name].dtype
            assert_within(f"d_{name} {isa}", a, e, e, 5 * sigma, factor=0.0)


@st.composite
def packed_calls(draw: st.DrawFn) -> tuple[Case, Tensor, Tensor]:
    """q, k and v without a batch, and where their sequences start."""
    sequences, group, kv = draw(st.integers(0, 4)), draw(st.integers(1, 3)), draw(st.integers(1, 2))
    lengths = [[draw(LENGTHS) for _ in range(sequences)] for _ in "qk"]
    starts = draw(st.sampled_from([torch.int32, torch.int64]))
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0).to(starts) for n in lengths)
    d, dv, dtype = draw(WIDTHS), draw(WIDTHS), draw(DTYPES)
    tq, tk = int(cu_q[-1]), int(cu_k[-1])
    q = draw(tensors([tq, kv * group, d], dtype))
    k, v = draw(tensors([tk, kv, d], dtype)), draw(tensors([tk, kv, dv], dtype))
    return Case(q, k, v, draw(options(sequences, kv * group))), cu_q, cu_k


@given(packed_calls())
def test_varlen(call: tuple[Case, Tensor, Tensor]) -> None:
    case, *starts = call
    results = []
    for isa in available_isas():
        with force_isa(isa):
            results.append(
                ops.attention_varlen(
                    case.q, case.k, case.v, *starts, **case.options, return_lse=True
                )
            )
    for i in range(len(starts[0]) - 1):
        rows, keys = (slice(*s[i : i + 2].tolist()) for s in starts)
        slopes = case.options["alibi_slopes"]
        more = {"attn_mask": None, "sequence": i}
        if slopes is not None and slopes.dim() == 2:
            more["alibi_slopes"] = slopes[i]
        tensors = (t.transpose(0, 1)[None] for t in (case.q[rows], case.k[keys], case.v[keys]))
        alone = Case(*tensors, {**case.options, **more})
        for out, lse in results:
            one = out[rows].transpose(0, 1)[None], lse[:, rows][None]
            check(alone, *one, bf16=case.q.dtype == torch.bfloat16)
