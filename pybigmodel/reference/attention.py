"""Scaled dot-product attention with everything around it, in plain PyTorch."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

Window: TypeAlias = tuple[int | None, int | None]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    causal_align: str = "bottom_right",
    sequence: int = 0,
) -> tuple[Tensor, Tensor]:
    """``softmax(scale·q·kᵀ …)·v`` and the logarithm of each row's sum, in the tensors' own dtype.

    What each option means stands at :func:`pybigmodel.ops.attention`; pass float64 for an oracle.
    A row that sees no key is zeros, its lse −inf, and every gradient through it zero. ``sequence``
    counts the batch from there on, for dropout.
    """
    (b, h, sq, d), sk = q.shape, k.shape[-2]
    k, v = (t.repeat_interleave(h // t.shape[1], 1) if t.shape[1] else t for t in (k, v))
    s = (d**-0.5 if scale is None else scale) * (q @ k.mT)
    if softcap:
        s = softcap * torch.tanh(s / softcap)
    distance = distances(sq, sk, causal_align, q.device)
    if alibi_slopes is not None:
        s = s - alibi_slopes.to(s.dtype)[..., None, None] * distance.abs()
    hidden = hidden_by_position(distance, causal, window)
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        s = s + attn_mask.to(s.dtype)
    elif attn_mask is not None:
        hidden = hidden | ~attn_mask
    s = s.masked_fill(hidden, -torch.inf)
    weights, lse = _softmax(s)
    if dropout_p:
        if dropout_seed is None:
            raise ValueError("the reference of dropout needs dropout_seed")
        keep = dropout_mask(int(dropout_seed), dropout_p, b, h, sq, sk, first=sequence)
        inverse = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        weights = weights.masked_fill(~keep, 0) * inverse
    return weights @ v, lse


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    alibi_slopes: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """:func:`attention` of every packed sequence for itself; (Tq, Hq, Dv) and (Hq, Tq)."""
    outs, sums = [v.new_empty(0, q.shape[1], v.shape[2])], [q.new_empty(q.shape[1], 0)]
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for i in range(len(ends_q) - 1):
        rows, keys = slice(*ends_q[i : i + 2]), slice(*ends_k[i : i + 2])
        one = (t.transpose(0, 1)[None] for t in (q[rows], k[keys], v[keys]))
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[i]
        out, lse = attention(*one, alibi_slopes=slopes, sequence=i, **options)
        outs.append(out[0].transpose(0, 1))
        sums.append(lse[0])
    return torch.cat(outs), torch.cat(sums, 1)


def distances(sq: int, sk: int, causal_align: str, device: torch.device | None = None) -> Tensor:
    """j − (i + off): how far key j stands after the key that belongs to query i; (Sq, Sk)."""
    if causal_align not in ("bottom_right", "top_left"):
        raise ValueError(f"causal_align must be bottom_right or top_left, got {causal_align!r}")
    off = sk - sq if causal_align == "bottom_right" else 0
    return torch.arange(sk, device=device) - torch.arange(sq, device=device)[:, None] - off


def hidden_by_position(distance: Tensor, causal: bool, window: Window | None) -> Tensor:
    """Where causality or the window hides a key from a query; of ``distance``'s shape."""
    left, right = window or (None, None)
    hidden = distance > 0 if causal else torch.zeros_like(distance, dtype=torch.bool)
    if left is not None and left != -1:
        hidden = hidden | (distance < -left)
    if right is not None and right != -1:
        hidden = hidden | (distance > right)
    return hidden


def _softmax(s: Tensor) -> tuple[Tensor, Tensor]:
    """softmax and logsumexp of the last dimension; of a row of −inf, zeros and −inf."""
    largest = s.detach().amax(-1, keepdim=True) if s.shape[-1] else s.new_zeros(*s.shape[:-1], 1)
    largest = largest.masked_fill(largest == -torch.inf, 0)
    e = torch.exp(s - largest)
    total = e.sum(-1, keepdim=True)
    empty = total == 0
    total = total.masked_fill(empty, 1)  # neither its logarithm nor its inverse meets a zero
    lse = (largest + torch.log(total)).masked_fill(empty, -torch.inf)
    return e / total, lse.squeeze(-1)


# --- dropout --------------------------------------------------------------------------------------


def dropout_mask(
    seed: int, p: float, b: int, h: int, sq: int, sk: int, *, first: int = 0
) -> Tensor:
    """The weights that dropout keeps, (B, H, Sq, Sk) bool: those with w >> 8 ≥ round(p·2²⁴).

    w is word j & 3 of Philox4x32-10 with counter (j >> 2, i, b·H + h, 0) and key (seed's low word,
    its high word); ``first`` is the number of the first batch entry.
    """
    groups, rows, heads = (
        torch.arange(begin, begin + n).view([-1 if axis == at else 1 for axis in range(3)])
        for at, begin, n in ((2, 0, (sk + 3) // 4), (1, 0, sq), (0, first * h, b * h))
    )
    words = philox4x32_10((groups, rows, heads, torch.zeros(1, 1, 1).long()), seed)
    shape = (b, h, sq, 4 * groups.numel())
    w = torch.stack(torch.broadcast_tensors(*words), -1).reshape(shape)[..., :sk]
    return (w >> 8) >= round(p * 2**24)


def philox4x32_10(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four random words for a counter of four, each in an int64; key: 64 bits.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", 2011.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, (key >> 32) & 0xFFFFFFFF
    for _ in range(10):
        high0, low0 = _product(0xD2511F53, c0)
        high1, low1 = _product(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def _product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of a·b: by halves of b, since int64 holds 63 bits of the 64."""
    upper, lower = a * (b >> 16), a * (b & 0xFFFF)
    high = (upper + (lower >> 16)) >> 16
    return high, (((upper & 0xFFFF) << 16) + lower) & 0xFFFFFFFF
