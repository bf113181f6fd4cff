"""Attention of new queries over a cache of keys and values, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from pybigmodel.reference.attention import Window, attention
from pybigmodel.reference.linear import quantize_per_token


def attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    k: Tensor | None = None,
    v: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    window: Window | None = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and lse in q's dtype (pass float64 for an oracle); the caches stay as they are.

    What each option means stands at :func:`pybigmodel.ops.attention_decode`.
    """
    outs, sums = [], []
    for b, length in enumerate(cache_seqlens.tolist()):
        keys = tokens(k_cache, k_scale, block_table, b, length).to(q.dtype)
        values = tokens(v_cache, v_scale, block_table, b, length).to(q.dtype)
        if k is not None and v is not None:
            keys = torch.cat([keys, as_cached(k[b], k_cache).to(q.dtype)], 1)
            values = torch.cat([values, as_cached(v[b], v_cache).to(q.dtype)], 1)
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        out, lse = attention(
            q[b : b + 1],
            keys[None],
            values[None],
            causal=True,
            window=window,
            alibi_slopes=slopes,
            softcap=softcap,
            scale=scale,
        )
        outs.append(out)
        sums.append(lse)
    empty = q.new_empty(*q.shape[:-1], v_cache.shape[-1])
    return (torch.cat(outs), torch.cat(sums)) if outs else (empty, empty.sum(-1))


def tokens(
    cache: Tensor, scale: Tensor | None, block_table: Tensor | None, b: int, length: int
) -> Tensor:
    """The first tokens of sequence b, (Hkv, length, D), block after block."""
    x = cache if scale is None else cache.double() * scale.double().unsqueeze(-1)
    if block_table is None:
        return x[b, :, :length]
    blocks = block_table[b, : -(-length // cache.shape[2])].long()
    return x[blocks].transpose(0, 1).flatten(1, 2)[:, :length]


def as_cached(x: Tensor, cache: Tensor) -> Tensor:
    """New tokens as they come back from the cache: quantised, if it is int8."""
    if cache.dtype != torch.int8:
        return x
    q, scale, _ = quantize_per_token(x, symmetric=True)
    return q.double() * scale.double().unsqueeze(-1)
