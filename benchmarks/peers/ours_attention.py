"""pybigmodel's ops of attention, called as a user calls them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from attention_shapes import Additive, Attention, Decode
from problem import MAX_COPIES, copies_for
from torch import Tensor

from peers import Contender, Unavailable
from peers.torch_attention import (
    additive_contender,
    attention_contender,
    caches,
    decode_contender,
)
from peers.torch_eager import DTYPES
from pybigmodel import ops


def build(problem: Attention) -> Contender:
    window = None if problem.window is None else (problem.window - 1, 0)
    return attention_contender(
        problem, partial(ops.attention, causal=problem.causal, window=window)
    )


def build_full(problem: Attention) -> Contender:
    """Beside causal attention, what it would cost to compute all pairs."""
    return _beside(replace(problem, causal=False))


def build_causal(problem: Attention) -> Contender:
    """Beside a window, what it would cost to see all earlier keys."""
    return _beside(replace(problem, window=None, causal=True))


def _beside(other: Attention) -> Contender:
    return replace(build(other), operations=other.operations, note=f"of {other.shape}")


def _decode(problem: Decode, k: Tensor, v: Tensor, **scales: Tensor) -> Callable[[], Tensor]:
    """A call that writes the last token's key and value into the cache, as a model's does."""
    data, dtype, past = problem.data, DTYPES[problem.precision], problem.keys - 1
    new = {"k": data.k[:, :, past:].to(dtype), "v": data.v[:, :, past:].to(dtype)}
    lengths = torch.full((problem.b,), past, dtype=torch.int32)
    return partial(ops.attention_decode, data.q.to(dtype), k, v, lengths, **new, **scales)


def build_decode(problem: Decode) -> Contender:
    return decode_contender(problem, [_decode(problem, *kv) for kv in caches(problem)])


def build_decode_int8(problem: Decode) -> Contender:
    """An int8 cache with a scale for each token and head; it lies in the problem's level too."""
    wanted = problem.level
    # Half the bytes: twice the copies.
    copies = copies_for(
        problem.int8_bytes, problem.threads, lambda level: level == wanted, most=2 * MAX_COPIES
    )
    if copies is None:
        raise Unavailable(f"no number of int8 caches in rotation lies in {wanted}")
    k, k_scale = quantize_per_token_head(problem.data.k)
    v, v_scale = quantize_per_token_head(problem.data.v)
    calls = [
        _decode(problem, k.clone(), v.clone(), k_scale=k_scale.clone(), v_scale=v_scale.clone())
        for _ in range(copies)
    ]
    return replace(
        decode_contender(problem, calls), streamed_bytes=problem.int8_bytes, note="int8 cache"
    )


def quantize_per_token_head(x: Tensor) -> tuple[Tensor, Tensor]:
    """(B, H, S, D) as int8 and float32 scales (B, H, S)."""
    scale = x.abs().amax(-1) / 127
    return (x / scale.unsqueeze(-1)).round().to(torch.int8), scale


def build_additive(problem: Additive) -> Contender:
    return additive_contender(problem, ops.additive_attention)
