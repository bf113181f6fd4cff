"""attention_decode and attention_append_: values, kinds of cache, what is read and written."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from attention_cases import check_lse, factor, name_of, theirs
from decode_cases import FLOATS, DecodeCase, copied, make, matrix
from torch import Tensor

from pybigmodel import _native, ops
from pybigmodel.reference import attention_decode as reference
from pybigmodel.testing import assert_exact, assert_no_worse, measure_error

MATRIX = matrix()
# Of int8 caches: q and weights in 16 bits, each off by up to 2⁻¹⁶ of its row's largest.
INT8_BOUND = 3e-4


def check(case: DecodeCase, out: Tensor, lse: Tensor, int8: bool) -> None:
    """All sequences' outputs together, so that luck does not decide; each one's lse."""
    expected, sums = case.exact()
    alone = case.sequences()
    if int8:
        finfo = torch.finfo(out.dtype)
        assert measure_error(out, expected).frobenius <= INT8_BOUND + finfo.eps
        seen = sums.isfinite()
        assert_exact(lse.isfinite(), seen)
        limit = 2.0**-13 * (1 + sums[seen].abs())
        assert ((lse[seen] - sums[seen]).abs() <= limit).all()
    else:
        peers = torch.cat([theirs(one) for one in alone])
        assert_no_worse(out, peers, expected, factor=factor(alone[0]))
        for b, one in enumerate(alone):
            check_lse(one, lse[b : b + 1])
    empty = sums == -torch.inf
    assert (lse[empty] == -torch.inf).all() and (out[empty] == 0).all()


@pytest.mark.parametrize("choice", MATRIX, ids=map(name_of, MATRIX))
def test_matrix(isa: str, choice: dict[str, Any]) -> None:
    case = make(choice)
    out, lse = case.copy().run()
    dtype = {4: "f32", 2: "bf16" if case.q.dtype == torch.bfloat16 else "f16"}[case.q.itemsize]
    kind = "s8" if choice["int8"] else dtype
    assert _native.last_kernel() == f"attention_decode_{kind}.{isa}"
    assert out.dtype == case.q.dtype and out.shape == (*case.q.shape[:-1], case.v_cache.shape[-1])
    check(case, out, lse, choice["int8"])


# --- appending ------------------------------------------------------------------------------------

APPENDED = [choice for choice in MATRIX if choice["append"]]


@pytest.mark.parametrize("choice", APPENDED, ids=map(name_of, APPENDED))
def test_append(isa: str, choice: dict[str, Any]) -> None:
    """The new tokens, exactly, in their slots; not one other byte."""
    case = make(choice)
    new = case.q.shape[2]
    for name in ("k", "v"):
        before = getattr(case, f"{name}_cache")
        scale, tokens = case.options.get(f"{name}_scale"), case.options[name]
        expected, expected_scale = copied(before), None if scale is None else copied(scale)
        for b, length in enumerate(case.cache_seqlens.tolist()):
            for i in range(new):
                at = length + i
                slot: tuple[Any, ...] = (b, slice(None), at)
                if case.block_table is not None:
                    size = before.shape[2]
                    slot = (int(case.block_table[b, at // size]), slice(None), at % size)
                if expected_scale is None:
                    expected[slot] = tokens[b, :, i]
                else:
                    q, s, _ = ops.quantize_per_token(tokens[b, :, i], symmetric=True)
                    expected[slot], expected_scale[slot] = q, s
        filled = case.copy()
        filled.run()
        assert_bytes(getattr(filled, f"{name}_cache"), expected)
        if expected_scale is not None:
            assert_bytes(filled.options[f"{name}_scale"], expected_scale)


def assert_bytes(actual: Tensor, expected: Tensor) -> None:
    """Of all that lies between the first element and the last one."""
    span = 1 + sum((n - 1) * s for n, s in zip(actual.shape, actual.stride(), strict=True))
    whole = [t.as_strided((span,), (1,)).view(torch.uint8) for t in (actual, expected)]
    assert torch.equal(*whole)


def test_append_alone_is_what_decode_does(isa: str) -> None:
    for int8 in (False, True):
        case = make({"shape": (3, 4, 2, 2, 33, 20), "dtype": torch.bfloat16, "append": True,
                     "int8": int8, "block": 16})  # fmt: skip
        together, apart = case.copy(), case.copy()
        out, lse = together.run()
        k, v = apart.options.pop("k"), apart.options.pop("v")
        scales = {n: apart.options[n] for n in ("k_scale", "v_scale") if n in apart.options}
        ops.attention_append_(apart.k_cache, apart.v_cache, k, v, case.cache_seqlens,
                              case.block_table, **scales)  # fmt: skip
        apart.cache_seqlens = case.cache_seqlens + 2
        for got, expected in zip(apart.run(), (out, lse), strict=True):
            assert_exact(got, expected)


def test_a_prompt_at_once(isa: str) -> None:
    """Hundreds of tokens to a sequence: the threads share them."""
    b, heads, s, d = 2, 3, 700, 40
    k, v = torch.randn(2, b, heads, s, d).unbind()
    for int8 in (False, True):
        k_cache, v_cache = torch.zeros(2, b, heads, s + 9, d).unbind()
        scales = {}
        if int8:
            k_cache, v_cache = (t.to(torch.int8) for t in (k_cache, v_cache))
            scales = {f"{n}_scale": torch.zeros(b, heads, s + 9) for n in "kv"}
        ops.attention_append_(k_cache, v_cache, k, v, torch.tensor([0, 9]).int(), **scales)
        for b_at, first in ((0, 0), (1, 9)):
            slots = slice(first, first + s)
            if int8:
                q, scale, _ = ops.quantize_per_token(v[b_at], symmetric=True)
                assert_exact(v_cache[b_at, :, slots], q)
                assert_exact(scales["v_scale"][b_at, :, slots], scale)
            else:
                assert_exact(k_cache[b_at, :, slots], k[b_at])
                assert_exact(v_cache[b_at, :, slots], v[b_at])
            rest = torch.ones(s + 9, dtype=torch.bool)
            rest[slots] = False
            assert not k_cache[b_at, :, rest].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_token_by_token_is_causal_attention(isa: str, dtype: torch.dtype) -> None:
    b, hq, hkv, s, d = 2, 6, 2, 70, 48
    q, k, v = (torch.randn(b, h, s, d).to(dtype) for h in (hq, hkv, hkv))
    k_cache, v_cache = (torch.full((b, hkv, s, d), torch.nan, dtype=dtype) for _ in range(2))
    outs = []
    for at in range(0, s, 2):
        new, lengths = slice(at, at + 2), torch.full((b,), at, dtype=torch.int32)
        outs.append(
            ops.attention_decode(
                q[:, :, new], k_cache, v_cache, lengths, k=k[:, :, new], v=v[:, :, new]
            )
        )
    got = torch.cat(outs, 2)
    attend = torch.nn.functional.scaled_dot_product_attention
    torchs, exact = (
        attend(*(t.to(to) for t in (q, k, v)), is_causal=True, enable_gqa=True)
        for to in (dtype, torch.float64)
    )
    assert_no_worse(got, torchs, exact)


# --- what a result depends on ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("int8", [False, True])
def test_where_tokens_lie_changes_no_bit(isa: str, int8: bool, dtype: torch.dtype) -> None:
    shape = (3, 4, 2, 2, 40, 24)
    plain = make({"shape": shape, "dtype": dtype, "int8": int8, "room": 1100})
    expected = plain.run()
    scales = [plain.options.get(f"{n}_scale") for n in "kv"]
    for block in (2, 16, 100, 2000):  # of odd ones bf16 and int8 pair other keys
        count = -(-1100 // block)
        table = torch.randperm(3 * count, dtype=torch.int32).view(3, count)

        def paged(
            x: Tensor, block: int = block, table: Tensor = table, count: int = count
        ) -> Tensor:
            wide = x.new_zeros(3, x.shape[1], count * block, *x.shape[3:])
            wide[:, :, : x.shape[2]] = x
            blocks = wide.unflatten(2, (count, block)).transpose(1, 2).flatten(0, 1)
            store = torch.empty_like(blocks)
            store[table.flatten().long()] = blocks
            return store

        options = dict(plain.options)
        for name, scale in zip(("k_scale", "v_scale"), scales, strict=True):
            if scale is not None:
                options[name] = paged(scale)
        case = DecodeCase(plain.q, paged(plain.k_cache), paged(plain.v_cache),
                          plain.cache_seqlens, table, options)  # fmt: skip
        for got, wanted in zip(case.run(), expected, strict=True):
            assert_exact(got, wanted)


@pytest.mark.parametrize("int8", [False, True])
def test_threads_and_neighbours_do_not_matter(isa: str, threads: None, int8: bool) -> None:
    case = make({"shape": (5, 8, 4, 1, 64, 64), "dtype": torch.float32, "int8": int8,
                 "room": 1600})  # fmt: skip
    torch.set_num_threads(1)
    expected = case.run()
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        for got, wanted in zip(case.run(), expected, strict=True):
            assert_exact(got, wanted)
    for b in range(5):
        options = {n: o[b : b + 1] if n.endswith("_scale") else o for n, o in case.options.items()}
        one = slice(b, b + 1)
        alone = DecodeCase(case.q[one], case.k_cache[one], case.v_cache[one],
                           case.cache_seqlens[one], None, options)  # fmt: skip
        for got, wanted in zip(alone.run(), expected, strict=True):
            assert_exact(got, wanted[one])


def test_sequences_may_share_blocks(isa: str) -> None:
    """A common prefix is stored once."""
    k_cache, v_cache = torch.randn(2, 4, 2, 8, 16).unbind()
    table = torch.tensor([[2, 0, 9], [2, 3, 1]], dtype=torch.int32)  # 9 does not exist: not in use
    case = DecodeCase(
        torch.randn(2, 2, 1, 16), k_cache, v_cache, torch.tensor([13, 20]).int(), table
    )
    out, lse = case.run()
    check(case, out, lse, int8=False)


def test_a_window_reads_nothing_else(isa: str) -> None:
    """Not even the table's entries: the blocks that the window has left may be reused."""
    case = make({"shape": (2, 4, 2, 1, 32, 32), "dtype": torch.float32, "room": 900})
    case.cache_seqlens = torch.tensor([700, 900], dtype=torch.int32)
    tokens = torch.randn(2, 2, 900, 32)
    case.k_cache, case.v_cache = tokens, tokens.flip(2).contiguous()
    case.options["window"] = (99, None)
    expected = case.run()
    check(case, *expected, int8=False)
    for cache in (case.k_cache, case.v_cache):
        cache[0, :, :600] = torch.nan
        cache[1, :, :800] = torch.nan
    for got, wanted in zip(case.run(), expected, strict=True):
        assert_exact(got, wanted)


@pytest.mark.parametrize("int8", [False, True])
def test_bad_numbers_spoil_what_sees_them(isa: str, int8: bool) -> None:
    case = make({"shape": (2, 4, 2, 2, 32, 20), "dtype": torch.float32, "int8": int8,
                 "room": 600})  # fmt: skip
    case.cache_seqlens = torch.tensor([600, 600], dtype=torch.int32)
    case.k_cache, case.v_cache = (
        torch.randint(-9, 9, t.shape).to(t.dtype) for t in (case.k_cache, case.v_cache)
    )
    for name in ("k_scale", "v_scale"):
        if int8:
            case.options[name] = torch.rand(2, 2, 600) / 50
    clean, sums = case.run()

    def spoilt(change: Any) -> tuple[Tensor, Tensor]:
        bad = case.copy()
        bad.q = bad.q.clone()
        change(bad)
        return bad.run()

    def query(bad: DecodeCase) -> None:
        bad.q[1, 3, 0, 5] = torch.nan

    out, lse = spoilt(query)
    assert out[1, 3, 0].isnan().all() and lse[1, 3, 0].isnan()
    out[1, 3, 0], lse[1, 3, 0] = clean[1, 3, 0], sums[1, 3, 0]
    assert_exact(out, clean)
    assert_exact(lse, sums)

    def key(bad: DecodeCase) -> None:  # the last token: the first of two queries does not see it
        if int8:
            bad.options["k_scale"][0, 1, 599] = torch.nan
        else:
            bad.k_cache[0, 1, 599, 7] = torch.nan

    out, lse = spoilt(key)
    assert out[0, 2:, 1].isnan().all() and lse[0, 2:, 1].isnan().all()
    out[0, 2:, 1], lse[0, 2:, 1] = clean[0, 2:, 1], sums[0, 2:, 1]
    assert_exact(out, clean)
    assert_exact(lse, sums)

    def value(bad: DecodeCase) -> None:
        if int8:
            bad.options["v_scale"][0, 1, 100] = torch.nan
        else:
            bad.v_cache[0, 1, 100, 7] = torch.nan

    out, lse = spoilt(value)
    assert_exact(lse, sums)
    columns = slice(None) if int8 else slice(7, 8)
    assert out[0, 2:, :, columns].isnan().all()
    out[0, 2:, :, columns] = clean[0, 2:, :, columns]
    assert_exact(out, clean)


def test_large_and_small_int8(isa: str) -> None:
    """Scales of many magnitudes, values at both ends: nothing overflows."""
    b, h, s, d = 1, 2, 1024, 64
    q = torch.randn(b, h, 1, d)
    codes = torch.randint(-127, 128, (2, b, h, s, d), dtype=torch.int8)
    codes[:, :, :, ::3] = 127
    codes[:, :, :, 1::3] = -127
    scales = torch.rand(2, b, h, s) * 10.0 ** torch.randint(-6, 1, (2, b, h, s)) / 100
    case = DecodeCase(q, codes[0], codes[1], torch.tensor([s], dtype=torch.int32), None,
                      {"k_scale": scales[0], "v_scale": scales[1]})  # fmt: skip
    out, lse = case.run()
    check(case, out, lse, int8=True)


def test_int8_costs_what_its_rounding_does(isa: str) -> None:
    """The kernel's own error is a small part of that of the int8 tokens."""
    b, hq, hkv, s, d = 2, 8, 2, 900, 64
    q, k, v = torch.randn(b, hq, 1, d), torch.randn(b, hkv, s, d), torch.randn(b, hkv, s, d)
    case = DecodeCase(q, *(torch.zeros(b, hkv, s, d, dtype=torch.int8) for _ in "kv"),
                      torch.zeros(b, dtype=torch.int32), None,
                      {f"{n}_scale": torch.zeros(b, hkv, s) for n in "kv"})  # fmt: skip
    scales = case.options
    ops.attention_append_(case.k_cache, case.v_cache, k, v, case.cache_seqlens, **scales)
    case.cache_seqlens += s
    out, _ = case.run()
    full = DecodeCase(q, k, v, case.cache_seqlens).exact()[0]
    rounding = measure_error(case.exact()[0], full).frobenius
    assert 1e-3 < rounding < 2e-2
    assert measure_error(out, case.exact()[0]).frobenius < rounding / 50


# --- edges ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(0, 2, 1, 1, 8, 8), (2, 0, 0, 1, 8, 8), (2, 2, 1, 0, 8, 5)])
def test_empty(isa: str, shape: tuple[int, ...]) -> None:
    case = make({"shape": shape, "dtype": torch.float32, "append": shape[3] > 0})
    out, lse = case.run()
    assert out.shape == (*shape[:2], shape[3], shape[5]) and out.numel() == lse.numel() == 0


def test_no_tokens_at_all(isa: str) -> None:
    caches = torch.zeros(2, 2, 1, 0, 8).unbind()
    nothing = torch.zeros(2, dtype=torch.int32)
    case = DecodeCase(torch.randn(2, 2, 1, 8), *caches, nothing)
    out, lse = case.run()
    assert_exact(out, torch.zeros(2, 2, 1, 8))
    assert_exact(lse, torch.full((2, 2, 1), -torch.inf))


def test_more_queries_than_tokens(isa: str) -> None:
    """The first ones stand before all of them."""
    case = make({"shape": (2, 2, 1, 6, 16, 16), "dtype": torch.float32, "room": 4})
    case.cache_seqlens = torch.tensor([4, 2], dtype=torch.int32)
    case.k_cache, case.v_cache = torch.randn(2, 2, 1, 4, 16).unbind()
    out, lse = case.run()
    assert (lse[0, :, :2] == -torch.inf).all() and (lse[1, :, :4] == -torch.inf).all()
    check(case, out, lse, int8=False)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_head_dimension(isa: str, dtype: torch.dtype) -> None:
    for d in range(1, 257, 3):
        for int8 in (False, True):
            case = make({"shape": (8, 2, 1, 1, d, 257 - d), "dtype": dtype, "int8": int8,
                         "room": 20})  # fmt: skip
            out, lse = case.run()
            check(case, out, lse, int8)


# --- beside torch ---------------------------------------------------------------------------------


def test_compile_and_autocast() -> None:
    case = make({"shape": (2, 4, 2, 1, 32, 32), "dtype": torch.float32, "append": True})
    torch._dynamo.reset()

    def step(case: DecodeCase) -> Tensor:
        out = ops.attention_decode(*case.positional, **case.options)
        assert isinstance(out, Tensor)
        return out

    eager, compiled = case.copy(), case.copy()
    expected = step(eager)
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_exact(run(compiled), expected)
    assert_bytes(compiled.k_cache, eager.k_cache)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        kept = case.copy()
        kept.q = case.q.bfloat16()  # as a projection leaves it; the cache is float32
        kept.options |= {n: case.options[n].bfloat16() for n in "kv"}
        assert step(kept).dtype == torch.float32
        half = make({"shape": (2, 4, 2, 1, 32, 32), "dtype": torch.bfloat16, "append": True})
        half.q = half.q.float()
        half.options |= {n: half.options[n].float() for n in "kv"}
        assert step(half).dtype == torch.bfloat16


def test_gradients_are_refused() -> None:
    case = make({"shape": (2, 4, 2, 1, 32, 32), "dtype": torch.float32, "append": True})
    for name in ("q", "k"):
        bad = case.copy()
        if name == "q":
            bad.q = bad.q.requires_grad_()
        else:
            bad.options = {**bad.options, "k": bad.options["k"].requires_grad_()}
        with pytest.raises(RuntimeError, match=rf"attention_decode: {name} requires grad"):
            bad.run()
        with torch.no_grad():
            bad.run()
        case.q.requires_grad_(False)
        case.options["k"].requires_grad_(False)


def test_bad_calls() -> None:
    """What depends on values, or is the wrapper's; the rest is in test_bad_calls.py."""
    case = make({"shape": (2, 4, 2, 1, 8, 8), "dtype": torch.float32, "append": True, "room": 20,
                 "block": 8})  # fmt: skip
    before = copied(case.k_cache)

    def refused(message: str, **changes: Any) -> None:
        bad = DecodeCase(case.q, case.k_cache, case.v_cache,
                         changes.get("cache_seqlens", case.cache_seqlens),
                         changes.get("block_table", case.block_table), case.options)  # fmt: skip
        with pytest.raises(RuntimeError, match=message):
            bad.run()
        assert_bytes(case.k_cache, before)

    full = torch.tensor([3, 24], dtype=torch.int32)  # 3 blocks of 8
    refused(r"cache_seqlens must be in 0\.\.23 .* got 24 of sequence 1", cache_seqlens=full)
    refused(r"cache_seqlens must be .* got -1 of sequence 0", cache_seqlens=-full // 3)
    lengths = torch.tensor([3, 17], dtype=torch.int32)
    for block in (-1, len(case.k_cache)):
        table = torch.zeros(2, 3, dtype=torch.int32)
        table[1, 2] = block
        refused(rf"block_table must hold blocks in .* got {block} as block 2 of sequence 1",
                cache_seqlens=lengths, block_table=table)  # fmt: skip
    with pytest.raises(ValueError, match="k and v must be given both or neither"):
        ops.attention_decode(case.q, case.k_cache, case.v_cache, lengths, k=case.options["k"])
    with pytest.raises(ValueError, match="window must be"):
        ops.attention_decode(case.q, case.k_cache, case.v_cache, lengths, window=(-2, 0))


def test_reference_on_a_case_by_hand() -> None:
    """One head, one dimension: two tokens of values 1 and 3, and equal scores."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    caches = (
        torch.zeros(1, 1, 4, 1, dtype=torch.float64),
        torch.tensor([1.0, 3, 9, 9]).view(1, 1, 4, 1).double(),
    )
    out, lse = reference.attention_decode(one, *caches, torch.tensor([2]))
    assert out.item() == 2 and abs(lse.item() - 0.6931471805599453) < 1e-15
