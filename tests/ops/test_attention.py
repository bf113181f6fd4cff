"""attention: values and lse of every option, layouts, masks, tiers, threads."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest
import torch
from attention_cases import (
    FLOATS,
    Case,
    check_forward,
    check_lse,
    exact,
    kernel_of,
    layouts,
    make,
    matrix,
    name_of,
    some_hidden,
    theirs,
)
from torch import Tensor

from pybigmodel import _native, ops
from pybigmodel.testing import assert_exact, assert_no_worse, available_isas, force_isa

MATRIX = matrix()


def both(case: Case, **more: Any) -> tuple[Tensor, Tensor]:
    """Output and lse of the op."""
    out, lse = case.call(ops.attention, return_lse=True, **more)
    return out, lse


@pytest.mark.parametrize("choice", MATRIX, ids=map(name_of, MATRIX))
def test_matrix(isa: str, choice: dict[str, Any]) -> None:
    case = make(choice)
    out, lse = both(case)
    assert _native.last_kernel() == f"{kernel_of(case)}.{isa}"
    check_forward(case, out, lse)
    assert_exact(case.call(ops.attention), out)


FEW = [choice for choice in MATRIX if "decode" in kernel_of(make(choice))]


@pytest.mark.parametrize("choice", FEW, ids=map(name_of, FEW))
def test_few_rows_for_backward(isa: str, choice: dict[str, Any]) -> None:
    """Of the kernel that backward repeats. Few rows that see few keys: twice the factor."""
    case = make(choice)
    out, lse = both(case.leaves("q")[0])
    assert not _native.last_kernel().startswith("attention_decode")
    check_forward(case, out.detach(), lse.detach(), luck=2)


def check_together(cases: Iterable[Case]) -> None:
    """Small results, 64 to a comparison, so that luck does not decide."""
    results = []
    for case in cases:
        out, lse = both(case)
        check_lse(case, lse)
        results.append((out, theirs(case), exact(case)[0]))
    for at in range(0, len(results), 64):
        group = zip(*results[at : at + 64], strict=True)
        assert_no_worse(*(torch.cat([t.flatten() for t in ts]) for ts in group))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_head_dimension(isa: str, threads: None, dtype: torch.dtype) -> None:
    torch.set_num_threads(1)  # many calls too small for two
    shapes = [(1, 2, 1, 9, 20, d, d * 7 % 256 + 1) for d in range(1, 257)]
    check_together(make({"shape": s, "dtype": dtype}) for s in shapes)


@pytest.mark.parametrize("causal", [None, "bottom_right"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_length(isa: str, threads: None, dtype: torch.dtype, causal: str | None) -> None:
    torch.set_num_threads(1)
    shapes = [(1, 1, 1, sq, sq * 37 % 150 + 1, 24, 20) for sq in range(1, 129)]
    check_together(make({"shape": s, "dtype": dtype, "causal": causal}) for s in shapes)


@pytest.mark.parametrize("hq", [6, 12])
@pytest.mark.parametrize("hkv", [1, 2, 3, 6])
def test_heads_share_keys(isa: str, hq: int, hkv: int) -> None:
    """Query head h reads head h // (Hq/Hkv): to the bit as if the keys were repeated."""
    case = make({"shape": (2, hq, hkv, 17, 40, 32, 24), "dtype": torch.float32})
    k, v = (t.repeat_interleave(hq // hkv, 1) for t in (case.k, case.v))
    for got, expected in zip(both(case), both(Case(case.q, k, v)), strict=True):
        assert_exact(got, expected)


@pytest.mark.parametrize("shape", [(2, 3, 3, 17, 33, 20, 20), (1, 2, 1, 1, 70, 64, 17)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(isa: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    """The layout of no argument changes one bit of the result."""
    case = make({"shape": shape, "dtype": dtype, "mask": "float32", "alibi": "batch"})
    plain = both(case)
    slopes = case.options["alibi_slopes"]
    mask = case.options["attn_mask"]
    for (kind, q), (_, k), (_, v), (_, m) in zip(
        *(layouts(t) for t in (case.q, case.k, case.v, mask)), strict=True
    ):
        assert torch.equal(q, case.q) and torch.equal(k, case.k) and torch.equal(v, case.v)
        for one in (
            Case(q, case.k, case.v, case.options),
            Case(case.q, k, case.v, case.options),
            Case(case.q, case.k, v, case.options),
            Case(q, k, v, {"attn_mask": m, "alibi_slopes": slopes.mT.contiguous().mT}),
        ):
            for got, expected in zip(both(one), plain, strict=True):
                assert torch.equal(got, expected), kind


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_fused_projection(isa: str, dtype: torch.dtype) -> None:
    """q, k and v as slices of one (B, S, (Hq + 2·Hkv)·D) tensor."""
    qkv = torch.randn(2, 21, (6 + 2 + 2) * 40).to(dtype)
    q, k, v = (
        t.unflatten(-1, (-1, 40)).transpose(1, 2) for t in qkv.split([6 * 40, 80, 80], dim=-1)
    )
    got = both(Case(q, k, v, {"causal": True}))
    plain = both(Case(q.contiguous(), k.contiguous(), v.contiguous(), {"causal": True}))
    for a, b in zip(got, plain, strict=True):
        assert_exact(a, b)


@pytest.mark.parametrize("rows", [3, 40])
def test_joining_the_heads_copies_nothing(rows: int) -> None:
    for layout in ("contiguous", "bshd"):
        case = make({"shape": (2, 5, 5, rows, 30, 16, 24), "dtype": FLOATS[0], "layout": layout})
        for one in (case, case.leaves("q")[0]):
            assert both(one)[0].transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_expanded(isa: str, dtype: torch.dtype) -> None:
    """Stride 0 in any dimension of any tensor."""
    whole = (2, 3, 9, 16)
    for fixed in product([False, True], repeat=4):
        small = [1 if f else n for f, n in zip(fixed, whole, strict=True)]
        q, k, v = (torch.randn(small).to(dtype).expand(whole) for _ in range(3))
        mask = torch.randn([*small[:3], 9]).expand(2, 3, 9, 9)
        plain = Case(q.contiguous(), k.contiguous(), v.contiguous(), {"attn_mask": mask.clone()})
        for a, b in zip(both(Case(q, k, v, {"attn_mask": mask})), both(plain), strict=True):
            assert_exact(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["bool", "float32", "dtype"])
def test_every_broadcast_of_the_mask(isa: str, kind: str, dtype: torch.dtype) -> None:
    """To the bit as with the whole mask, whichever dimensions are 1 or missing."""
    case = make({"shape": (2, 4, 2, 7, 37, 16, 16), "dtype": dtype})
    whole = (2, 4, 7, 37)
    seen = []
    for ones in product([False, True], repeat=4):
        shape = [1 if one else n for one, n in zip(ones, whole, strict=True)]
        mask = torch.randn(shape).to(dtype if kind == "dtype" else torch.float32)
        if kind == "bool":
            mask = mask > -0.5
        case.options["attn_mask"] = mask.expand(whole).contiguous()
        expected = both(case)
        check_forward(case, *expected)
        while True:
            case.options["attn_mask"] = mask
            for got, other in zip(both(case), expected, strict=True):
                assert_exact(got, other)
            seen.append(tuple(mask.shape))
            if mask.dim() == 0 or mask.shape[0] != 1:
                break
            mask = mask[0]
    assert () in seen and (37,) in seen and (7, 1) in seen and (2, 1, 1, 37) in seen


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(
    "shape",
    [(0, 2, 1, 3, 4, 8, 8), (2, 2, 1, 0, 4, 8, 8), (2, 2, 1, 3, 0, 8, 5), (0, 2, 2, 0, 0, 1, 1)],
    ids=str,
)
def test_empty(isa: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for mask in ("none", "float32", "bool"):
        for causal in (None, "bottom_right"):
            case = make({"shape": shape, "dtype": dtype, "mask": mask, "causal": causal})
            out, lse = both(case)
            assert_exact(out, torch.zeros(*case.q.shape[:-1], shape[-1], dtype=dtype))
            assert_exact(lse, torch.full(case.q.shape[:-1], -torch.inf))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rows_that_see_nothing(isa: str, dtype: torch.dtype) -> None:
    """Zeros and −inf, whatever it is that hides; the rows beside them as ever."""
    sq, sk = 70, 40
    hidden = ~some_hidden(sq, sk)
    for options in (
        {"attn_mask": ~hidden},
        {"attn_mask": torch.zeros(sq, sk, dtype=dtype).masked_fill(hidden, -torch.inf)},
        {"attn_mask": torch.randn(sq, sk).masked_fill(hidden, -torch.inf), "softcap": 2.0},
        {"causal": True},  # 30 queries more than keys: the first ones see none
        {"window": (3, 3)},
        {"window": (3, 3), "causal_align": "top_left"},
        {"window": (0, 0), "attn_mask": ~hidden, "alibi_slopes": torch.rand(2)},
        {"attn_mask": torch.zeros(2, 1, 1, 1, dtype=torch.bool)},
    ):
        case = make({"shape": (2, 2, 2, sq, sk, 20, 20), "dtype": dtype})
        case.options = options
        out, lse = both(case)
        empty = exact(case)[1] == -torch.inf
        assert empty.any()
        assert (lse[empty] == -torch.inf).all() and (out[empty] == 0).all()
        check_forward(case, out, lse)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_products_in_bf16(isa: str, dtype: torch.dtype) -> None:
    """precision="bf16": no worse than torch in bf16; of bf16 tensors, the same as None."""
    for causal in (None, "bottom_right"):
        shape = (2, 4, 2, 65, 130, 64, 48)
        case = make({"shape": shape, "dtype": dtype, "causal": causal, "mask": "float32"})
        rounded = Case(case.q.bfloat16(), case.k.bfloat16(), case.v.bfloat16(), case.options)
        out, lse = both(case, precision="bf16")
        expected, _ = exact(case)
        assert_no_worse(out, theirs(rounded).to(dtype), expected)
        check_lse(rounded, lse)
        assert (out != both(case)[0]).any()
        for got, other in zip(both(rounded, precision="bf16"), both(rounded), strict=True):
            assert_exact(got, other)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_products_in_fp32(isa: str, dtype: torch.dtype) -> None:
    """What float32 and float16 take by default; bfloat16 tensors have bfloat16 products always."""
    case = make({"shape": (2, 4, 2, 65, 130, 64, 48), "dtype": dtype, "mask": "bool"})
    for got, other in zip(both(case, precision="fp32"), both(case), strict=True):
        assert_exact(got, other)
    flavour = "bf16" if dtype == torch.bfloat16 else "f32"
    assert _native.last_kernel() == f"attention_{flavour}.{isa}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_scales_and_caps(isa: str, dtype: torch.dtype) -> None:
    """Zero and negative scales; caps that bend everything, and nothing."""
    for scale, softcap in [(0.0, 0.0), (-0.3, 0.0), (3.0, 0.01), (0.2, 1e4), (0.0, 1.0), (-1, 30)]:
        case = make({"shape": (1, 2, 2, 21, 70, 33, 33), "dtype": dtype})
        case.options = {"scale": scale, "softcap": softcap}
        check_forward(case, *both(case))


def test_alibi_of_the_batch_and_of_heads(isa: str) -> None:
    case = make({"shape": (3, 4, 2, 19, 35, 16, 16), "dtype": torch.float32, "alibi": "heads"})
    slopes = case.options["alibi_slopes"]
    expected = both(case)
    case.options["alibi_slopes"] = slopes.expand(3, 4)
    for got, other in zip(both(case), expected, strict=True):
        assert_exact(got, other)


@pytest.mark.parametrize("n", [-1, None, 0, 1, 30, 10**12])
def test_window_of_any_width(isa: str, n: int | None) -> None:
    """−1 and None are unbounded; one side may be; no width overflows."""
    for window in ((n, None), (-1, n), (n, n)):
        for align in ("bottom_right", "top_left"):
            case = make({"shape": (1, 2, 2, 37, 71, 16, 16), "dtype": torch.float32})
            case.options = {"window": window, "causal_align": align}
            check_forward(case, *both(case))


def test_causal_is_a_window(isa: str) -> None:
    """To the bit: the same keys are visible."""
    for sq, sk in [(5, 5), (40, 100), (100, 40), (1, 65), (300, 300)]:
        case = make({"shape": (1, 2, 2, sq, sk, 32, 32), "dtype": torch.float32})
        for align in ("bottom_right", "top_left"):
            case.options = {"causal": True, "causal_align": align}
            expected = both(case)
            case.options = {"window": (-1, 0), "causal_align": align}
            for got, other in zip(both(case), expected, strict=True):
                assert_exact(got, other)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window": (50, 3)},
    "much": {"alibi_slopes": torch.rand(4), "softcap": 3.0, "causal": True},
}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_threads_and_repeats_agree(
    isa: str, threads: None, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """No sum depends on how the work is cut over threads."""
    for shape in [
        (1, 4, 1, 130, 200, 32, 32),
        (3, 4, 4, 20, 64, 16, 24),
        (1, 4, 2, 1, 700, 64, 64),
    ]:
        case = make({"shape": shape, "dtype": dtype})
        case.options = options
        results = []
        for count in (1, 2, 2, 3, 5):
            torch.set_num_threads(count)
            results.append(both(case))
        for result in results[1:]:
            for got, expected in zip(result, results[0], strict=True):
                assert_exact(got, expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_sequences_do_not_depend_on_the_batch(
    isa: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    case = make({"shape": (5, 4, 2, 67, 130, 40, 40), "dtype": dtype})
    case.options = options
    whole = both(case)
    for begin, end in [(0, 1), (4, 5), (1, 3), (0, 4)]:
        part = Case(case.q[begin:end], case.k[begin:end], case.v[begin:end], options)
        for got, expected in zip(both(part), whole, strict=True):
            assert_exact(got, expected[begin:end])
    if "alibi_slopes" not in options:
        part = Case(case.q[:, 2:], case.k[:, 1:], case.v[:, 1:], options)
        for got, expected in zip(both(part), whole, strict=True):
            assert_exact(got, expected[:, 2:])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_tiers_agree(dtype: torch.dtype) -> None:
    """Tiers differ by rounding only: each within the policy of the same case."""
    case = make({"shape": (2, 4, 2, 50, 300, 64, 64), "dtype": dtype, "causal": "bottom_right"})
    for name in available_isas():
        with force_isa(name):
            check_forward(case, *both(case))


def test_names_of_enums() -> None:
    q = torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"causal_align must be .*top_left.*; got 'left'"):
        ops.attention(q, q, q, causal_align="left")
    with pytest.raises(ValueError, match=r"precision must be .*; got 'tf32'"):
        ops.attention(q, q, q, precision="tf32")
