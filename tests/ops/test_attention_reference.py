"""The oracle of attention against what others publish: torch's SDPA, Random123's vectors."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pybigmodel.reference.attention import (
    attention,
    attention_varlen,
    dropout_mask,
    philox4x32_10,
)
from pybigmodel.testing import assert_exact

F64 = torch.float64

# Random123's tests/kat_vectors: counter, key, result.
KNOWN_ANSWERS = """
00000000 00000000 00000000 00000000 00000000 00000000 6627e8d5 e169c58d bc57ac4c 9b00dbd8
ffffffff ffffffff ffffffff ffffffff ffffffff ffffffff 408f276d 41c83b0e a20bc7c6 6d5451fd
243f6a88 85a308d3 13198a2e 03707344 a4093822 299f31d0 d16cfe09 94fdcceb 5001e420 24126ea1
"""


def qkv(
    b: int, hq: int, hkv: int, sq: int, sk: int, d: int, dv: int
) -> tuple[Tensor, Tensor, Tensor]:
    """float64 leaves."""
    shapes = ((b, hq, sq, d), (b, hkv, sk, d), (b, hkv, sk, dv))
    q, k, v = (torch.randn(s, dtype=F64, requires_grad=True) for s in shapes)
    return q, k, v


@pytest.mark.parametrize("line", KNOWN_ANSWERS.split("\n")[1:-1])
def test_philox_known_answers(line: str) -> None:
    c0, c1, c2, c3, k0, k1, *expected = (int(word, 16) for word in line.split())
    got = philox4x32_10(tuple(torch.tensor([c]) for c in (c0, c1, c2, c3)), k1 << 32 | k0)
    assert [int(word) for word in got] == expected
    signed = (k1 << 32 | k0) - (k1 >> 31 << 64)  # the same key as an int64
    again = philox4x32_10(tuple(torch.tensor([c]) for c in (c0, c1, c2, c3)), signed)
    assert [int(word) for word in again] == expected


def test_dropout_mask_is_the_words_in_order() -> None:
    """Element by element, as the definition reads."""
    b, h, sq, sk, seed, p = 2, 3, 4, 7, -(2**40) + 5, 0.4
    mask = dropout_mask(seed, p, b, h, sq, sk)
    assert mask.shape == (b, h, sq, sk)
    for at in torch.cartesian_prod(*map(torch.arange, mask.shape)).tolist():
        n, head, i, j = at
        counter = tuple(torch.tensor([c]) for c in (j >> 2, i, n * h + head, 0))
        word = int(philox4x32_10(counter, seed)[j & 3])
        assert bool(mask[n, head, i, j]) == ((word >> 8) >= round(p * 2**24))
    assert_exact(dropout_mask(seed, p, 1, h, sq, sk, first=1), mask[1:])


def test_dropout_statistics() -> None:
    """Frequency, and independence of the neighbours in each direction: within 5 σ."""
    for p in (0.1, 0.5, 0.9):
        keep = dropout_mask(12345, p, 4, 4, 64, 64).double()
        n = keep.numel()
        assert abs(keep.mean() - (1 - p)) < 5 * math.sqrt(p * (1 - p) / n)
        centred = keep - (1 - p)
        for axis in range(4):
            pairs = centred * centred.roll(1, axis)
            assert abs(pairs.mean()) < 5 * p * (1 - p) / math.sqrt(n)
    assert dropout_mask(1, 0.0, 1, 1, 9, 9).all()
    assert not dropout_mask(1, 1.0, 1, 1, 9, 9).any()


@pytest.mark.parametrize("sk", [1, 5, 9])
@pytest.mark.parametrize("mask", [None, "bool", "float"])
def test_against_sdpa(mask: str | None, sk: int) -> None:
    q, k, v = (t.detach() for t in qkv(2, 4, 2, 6, sk, 5, 3))
    attn_mask = torch.randn(2, 1, 6, sk, dtype=F64)
    if mask == "bool":
        attn_mask = attn_mask > 0
        attn_mask[..., 2, :] = False
    got, lse = attention(q, k, v, attn_mask=None if mask is None else attn_mask, scale=0.7)
    more = {"attn_mask": None if mask is None else attn_mask, "scale": 0.7, "enable_gqa": True}
    torch.testing.assert_close(got, F.scaled_dot_product_attention(q, k, v, **more))
    assert got.shape == (2, 4, 6, 3) and lse.shape == (2, 4, 6)
    got, _ = attention(q, k, v, causal=True, causal_align="top_left")
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(got, expected)


def test_lse() -> None:
    q, k, v = qkv(1, 2, 1, 3, 4, 5, 5)
    _, lse = attention(q, k, v, softcap=3.0)
    s = 3 * torch.tanh(q @ k.mT / 5**0.5 / 3)
    torch.testing.assert_close(lse, torch.logsumexp(s, -1))


def test_alignment_window_and_alibi_by_hand() -> None:
    """Zero scores: the weights are uniform over what is visible, or e^(−slope·distance)."""
    q, k, v = torch.zeros(1, 1, 2, 1, dtype=F64), torch.zeros(1, 1, 4, 1, dtype=F64), torch.eye(4)
    v = v.double()[None, None]

    def rows(**options: object) -> list[list[float]]:
        out, _ = attention(q, k, v, **options)  # type: ignore[arg-type]
        return [[round(x, 12) for x in row] for row in out[0, 0].tolist()]

    third = round(1 / 3, 12)
    assert rows(causal=True) == [[third] * 3 + [0], [0.25] * 4]
    assert rows(causal=True, causal_align="top_left") == [[1, 0, 0, 0], [0.5, 0.5, 0, 0]]
    assert rows(window=(1, 0)) == [[0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]]
    assert rows(window=(0, None)) == [[0, 0, 0.5, 0.5], [0, 0, 0, 1]]
    assert rows(window=(-1, 0)) == rows(causal=True)
    assert rows(window=(-1, 0), causal_align="top_left") == [[1, 0, 0, 0], [0.5, 0.5, 0, 0]]
    slopes = torch.tensor([math.log(2)])
    halves = rows(alibi_slopes=slopes, causal=True)
    assert halves[0][:3] == pytest.approx([1 / 7, 2 / 7, 4 / 7])
    assert halves[1] == pytest.approx([1 / 15, 2 / 15, 4 / 15, 8 / 15])
    both_sides = rows(alibi_slopes=slopes, causal_align="top_left")
    assert both_sides[1] == pytest.approx([2 / 9, 4 / 9, 2 / 9, 1 / 9])


OPTIONS: dict[str, dict[str, object]] = {
    "plain": {},
    "causal": {"causal": True},
    "top_left": {"causal": True, "causal_align": "top_left"},
    "window": {"window": (2, 1), "softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "alibi of the batch": {"alibi_slopes": torch.rand(2, 4, dtype=F64), "causal": True},
    "dropout": {"dropout_p": 0.4, "dropout_seed": 3},
    "empty rows": {"window": (0, 0), "causal_align": "top_left"},
}


@pytest.mark.parametrize("mask", [None, "bool", "float", "infinite"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_gradcheck(options: dict[str, object], mask: str | None) -> None:
    q, k, v = qkv(2, 4, 2, 5, 3, 2, 3)
    leaves = [q, k, v]
    attn_mask = None
    if mask is not None:
        attn_mask = torch.randn(1, 4, 5, 3, dtype=F64)
        if mask == "bool":
            attn_mask = attn_mask > 0
        elif mask == "float":
            leaves.append(attn_mask.requires_grad_())
        else:
            attn_mask[:, :, 1] = -torch.inf
            attn_mask[:, :, 2, 1] = -torch.inf

    def f(q: Tensor, k: Tensor, v: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor]:
        given = rest[0] if rest else attn_mask
        out, lse = attention(q, k, v, attn_mask=given, **options)  # type: ignore[arg-type]
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(f, leaves)


def test_rows_that_see_nothing() -> None:
    """Zeros, −inf, and gradients of exactly zero, wherever the row is hidden from."""
    hidden = torch.zeros(1, 1, 4, 6, dtype=F64)
    hidden[..., 1, :] = -torch.inf
    cases: list[dict[str, object]] = [
        {"attn_mask": hidden.requires_grad_()},
        {"attn_mask": hidden.detach() == 0},
        {"window": (0, 0), "attn_mask": torch.ones(4, 6).tril(-3) == 1},
        {"window": (0, 0), "causal_align": "top_left", "attn_mask": torch.arange(6) != 1},
    ]
    for options in cases:
        q, k, v = qkv(1, 2, 2, 4, 6, 3, 3)
        out, lse = attention(q, k, v, **options)  # type: ignore[arg-type]
        empty = lse == -torch.inf
        assert empty.any() and not out.isnan().any()
        assert (out[empty] == 0).all() and (out[~empty] != 0).all()
        leaves = [q, k, v, *([hidden] if options["attn_mask"] is hidden else [])]
        grads = torch.autograd.grad((out.sum(), lse.sum()), leaves, allow_unused=True)
        assert all(g is None or g.isfinite().all() for g in grads)
        assert grads[0] is not None and (grads[0][empty] == 0).all()


def test_empty() -> None:
    for shape in [(0, 2, 1, 3, 4, 5, 5), (1, 2, 1, 0, 4, 5, 5), (1, 2, 1, 3, 0, 5, 6)]:
        q, k, v = qkv(*shape)
        out, lse = attention(q, k, v, causal=True, dropout_p=0.5, dropout_seed=1)
        assert out.shape == (*q.shape[:-1], v.shape[-1]) and lse.shape == q.shape[:-1]
        assert (out == 0).all() and (lse == -torch.inf).all()
        (out.sum() + lse.nan_to_num(neginf=0).sum()).backward()
        assert q.grad is not None and (q.grad == 0).all()


def test_dropout_drops_weights() -> None:
    q, k, _ = qkv(2, 3, 3, 4, 6, 5, 5)
    v = torch.eye(6, dtype=F64).expand(2, 3, 6, 6)
    weights, lse = attention(q, k, v)
    dropped, same = attention(q, k, v, dropout_p=0.25, dropout_seed=torch.tensor([77]))
    keep = dropout_mask(77, 0.25, 2, 3, 4, 6)
    torch.testing.assert_close(dropped, weights * keep / 0.75)
    assert_exact(same, lse)
    assert (attention(q, k, v, dropout_p=1.0, dropout_seed=1)[0] == 0).all()
    with pytest.raises(ValueError, match="needs dropout_seed"):
        attention(q, k, v, dropout_p=0.1)


def test_varlen_is_each_sequence_for_itself() -> None:
    lengths_q, lengths_k = [3, 0, 5, 1], [3, 4, 2, 0]
    cu_q, cu_k = (torch.tensor([0, *n]).cumsum(0) for n in (lengths_q, lengths_k))
    q, k, v = (torch.randn(t, h, 5, dtype=F64) for t, h in ((9, 4), (9, 2), (9, 2)))
    slopes = torch.rand(4, 4, dtype=F64)
    more = {"causal": True, "dropout_p": 0.3, "dropout_seed": 9}
    out, lse = attention_varlen(q, k, v, cu_q, cu_k, alibi_slopes=slopes, **more)
    assert out.shape == (9, 4, 5) and lse.shape == (4, 9)
    # Sequences 0 and 2 of a padded batch, which dropout counts in the same way.
    at = 2
    rows, keys = slice(3, 8), slice(7, 9)
    padded_q, padded_k, padded_v = (
        torch.zeros(4, h, n, 5).double() for h, n in ((4, 5), (2, 2), (2, 2))
    )
    padded_q[at], padded_k[at], padded_v[at] = (
        t.transpose(0, 1) for t in (q[rows], k[keys], v[keys])
    )
    expected, sums = attention(padded_q, padded_k, padded_v, alibi_slopes=slopes, **more)  # type: ignore[arg-type]
    assert_exact(out[rows], expected[at].transpose(0, 1))
    assert_exact(lse[:, rows], sums[at])
    assert (out[8:] == 0).all() and (lse[:, 8:] == -torch.inf).all()
    nothing = attention_varlen(q[:0], k[:0], v[:0], torch.tensor([0]), torch.tensor([0]))
    assert nothing[0].shape == (0, 4, 5) and nothing[1].shape == (4, 0)
