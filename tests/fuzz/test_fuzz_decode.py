"""Random calls of attention_decode: every tier against float64, caches of every kind."""

from __future__ import annotations

from typing import Any

import torch
from attention_bounds import check
from decode_cases import DecodeCase, make
from hypothesis import given
from hypothesis import strategies as st

from pybigmodel.testing import assert_exact, available_isas, force_isa, measure_error

WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 200, 256]))


@st.composite
def choices(draw: st.DrawFn) -> dict[str, Any]:
    kv, group, new = draw(st.integers(1, 3)), draw(st.integers(1, 7)), draw(st.integers(1, 5))
    room = draw(st.one_of(st.integers(5, 80), st.sampled_from([511, 512, 513, 1100])))
    return {
        "shape": (draw(st.integers(1, 3)), kv * group, kv, new, draw(WIDTHS), draw(WIDTHS)),
        "dtype": draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        "int8": draw(st.booleans()),
        "block": draw(st.one_of(st.none(), st.integers(1, 20), st.sampled_from([64, 300]))),
        "layout": draw(st.sampled_from(["contiguous", "bshd", "slices", "every second row"])),
        "append": draw(st.booleans()),
        "room": room,
        "window": draw(st.sampled_from([None, (0, 0), (7, None), (600, 3)])),
        "alibi": draw(st.sampled_from([None, "heads", "batch"])),
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.0])),
        "scale": draw(st.sampled_from([None, None, 0.3, -0.1])),
    }


@given(choices(), st.integers(0, 2**31))
def test_attention_decode(choice: dict[str, Any], seed: int) -> None:
    torch.manual_seed(seed)
    case = make(choice)
    for isa in available_isas():
        with force_isa(isa):
            out, lse = case.copy().run()
        assert out.dtype == case.q.dtype
        if choice["int8"]:
            check_int8(case, out, lse)
            continue
        for b, alone in enumerate(case.sequences()):
            alone.options |= {"attn_mask": None, "causal_align": "bottom_right"}
            one = slice(b, b + 1)
            check(alone, out[one], lse[one], bf16=out.dtype == torch.bfloat16)


def check_int8(case: DecodeCase, out: torch.Tensor, lse: torch.Tensor) -> None:
    """Of q and weights in 16 bits, each off by 2⁻¹⁶ of the largest beside it."""
    expected, sums = case.exact()
    seen = sums.isfinite()
    assert_exact(lse.isfinite(), seen)
    assert ((lse[seen] - sums[seen]).abs() <= 2.0**-11 * (1 + sums[seen].abs())).all()
    assert measure_error(out, expected).maximum <= 2e-3 + torch.finfo(out.dtype).eps
