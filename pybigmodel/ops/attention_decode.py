"""Attention of new queries over a cache of keys and values, and appending to that cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pybigmodel._torch_private import below_autocast
from pybigmodel.ops import _checks as check
from pybigmodel.ops._attention_checks import MAX_HEAD_DIM, check_options
from pybigmodel.ops._autocast import cast
from pybigmodel.ops._common import refuse_derivative
from pybigmodel.ops.attention import Window, window_sides

_ops = torch.ops.pybigmodel
_attention_append_ = _ops.attention_append_.default
_attention_decode = _ops.attention_decode.default


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
    window: Window = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of a few new queries over a cache, which is read once and in place; for inference.

    The formulas of :func:`pybigmodel.ops.attention`, causal: with n tokens of a sequence in the
    cache, query i of Sq stands at position n − Sq + i and sees the keys up to there. n is
    ``cache_seqlens[b]``, or ``cache_seqlens[b] + Sq`` if ``k`` and ``v`` are given: these are
    first appended, as by :func:`attention_append_`. A query that sees nothing gives zeros and an
    lse of −∞.

    Args:
        q: (B, Hq, Sq, D), float32, bfloat16 or float16, any strides. Made for small Sq: each key is
            met by the Hq/Hkv·Sq queries that share its head while it is at hand.
        k_cache, v_cache: (B, Hkv, S_max, D) and (B, Hkv, S_max, Dv), or with ``block_table``
            (blocks, Hkv, block_size, D) and (…, Dv); any strides with a contiguous last dimension.
            q's dtype, or int8. D and Dv are 1 to 256. Slots beyond a sequence's tokens are not
            read.
        cache_seqlens: (B,) int32, the tokens of each sequence before this call.
        block_table: (B, max_blocks) int32: token j of sequence b is slot j mod block_size of block
            ``block_table[b, j // block_size]``.
        k, v: (B, Hkv, Sq, D) and (B, Hkv, Sq, Dv), q's dtype: the new tokens, both or neither.
        k_scale, v_scale: (B, Hkv, S_max) or (blocks, Hkv, block_size) float32, for int8 caches
            only: a token's value is its int8 times its scale.
        window: (left, right): the tokens before a query that stay visible; right is without effect.
        alibi_slopes: float32, (Hq,) or (B, Hq).
        softcap, scale: as for :func:`pybigmodel.ops.attention`.
        return_lse: also return lse, (B, Hq, Sq) float32.

    Returns:
        (B, Hq, Sq, Dv), q's dtype; with ``return_lse`` a pair.

    Numerics: as :func:`pybigmodel.ops.attention`; parts of 512 keys are summed apart and merged in
    order, so that a row's result does not depend on batch or threads. With int8 caches q is carried
    in 16 bits, |error| ≤ 2⁻¹⁶·max|q| of its row an element, and probabilities times ``v_scale``
    likewise, relative to the largest of each part; the integer sums are exact. That is a hundredth
    of what the int8 tokens themselves cost.

    Raises:
        RuntimeError: a wrong dtype, shape, device or value, a cache without room, or a tensor that
            requires grad while gradients are recorded, naming the argument.
        ValueError: only one of k and v, or a wrong window.

    Under autocast q, k and v take a floating cache's dtype, beside an int8 one autocast's.

    Source: Dao et al., "Flash-Decoding for long-context inference", 2023.
    """
    refuse_derivative("attention_decode", q=q, k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    if (k is None) != (v is None):
        raise ValueError("attention_decode: k and v must be given both or neither")
    left, _ = window_sides(window)
    new_tokens = 0
    if k is not None:
        _attention_append_(k_cache, v_cache, k_scale, v_scale, k, v, cache_seqlens, block_table)
        new_tokens = k.shape[2]
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    out, lse = _attention_decode(
        q,
        k_cache,
        v_cache,
        cache_seqlens,
        block_table,
        k_scale,
        v_scale,
        alibi_slopes,
        new_tokens,
        left,
        softcap,
        scale,
    )
    return (out, lse) if return_lse else out


def attention_append_(
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None = None,
    *,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> None:
    """New tokens into a cache, in place: k_i and v_i at position ``cache_seqlens[b] + i``.

    ``cache_seqlens`` stays as it is: the caller adds S to it. Sequences may share blocks that are
    only read; slots that are written must be distinct.

    Into an int8 cache they go as ``round(x/s)`` with ``s = max|x|/127`` of the token and head, as
    :func:`pybigmodel.ops.quantize_per_token` has it, and s into ``k_scale`` and ``v_scale``.

    Args:
        k_cache, v_cache, cache_seqlens, block_table, k_scale, v_scale: as for
            :func:`attention_decode`; caches and scales are written.
        k, v: (B, Hkv, S, D) and (B, Hkv, S, Dv), float32, bfloat16 or float16; a floating cache's
            dtype.

    Raises:
        RuntimeError: a wrong dtype, shape or device, a cache without room (nothing is written
            then), or a tensor that requires grad while gradients are recorded, naming the argument.
    """
    refuse_derivative("attention_append_", k_cache=k_cache, v_cache=v_cache, k=k, v=v)
    _attention_append_(k_cache, v_cache, k_scale, v_scale, k, v, cache_seqlens, block_table)


# --- fake kernels -------------------------------------------------------------------------------


def _check_caches(
    op: str,
    q_name: str,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
) -> None:
    check.check_float(op, q_name, q)
    check.check_dim(op, q_name, q, 4)
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        check.check_dim(op, name, cache, 4)
        check.check_same_device(op, name, cache, q)
        torch._check(
            cache.dtype in (q.dtype, torch.int8),
            lambda name=name, cache=cache: (
                f"{op}: {name} must be {check.name_of(q.dtype)} as {q_name} is, or int8, got "
                f"{check.name_of(cache.dtype)}"
            ),
        )
        torch._check(
            cache.shape[3] <= 1 or cache.stride(3) == 1,
            lambda name=name, cache=cache: (
                f"{op}: {name}'s last dimension must be contiguous, since a cache is used in "
                f"place; got stride {cache.stride(3)}"
            ),
        )
    torch._check(
        v_cache.dtype == k_cache.dtype,
        lambda: (
            f"{op}: v_cache must be {check.name_of(k_cache.dtype)} as k_cache is, got "
            f"{check.name_of(v_cache.dtype)}"
        ),
    )
    for at in range(3):
        torch._check(
            v_cache.shape[at] == k_cache.shape[at],
            lambda: (
                f"{op}: v_cache must have k_cache's shape but for the last dimension, k_cache has "
                f"shape {tuple(k_cache.shape)}, got {tuple(v_cache.shape)}"
            ),
        )
    torch._check(
        q.shape[3] == k_cache.shape[3],
        lambda: (
            f"{op}: {q_name} must have k_cache's last dimension {k_cache.shape[3]}, got shape "
            f"{tuple(q.shape)}"
        ),
    )
    for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
        torch._check(
            1 <= cache.shape[3] <= MAX_HEAD_DIM,
            lambda name=name, cache=cache: (
                f"{op}: {name}'s last dimension must be in 1..{MAX_HEAD_DIM}, got {cache.shape[3]}"
            ),
        )
    _check_scale(op, "k_scale", k_scale, k_cache, q)
    _check_scale(op, "v_scale", v_scale, k_cache, q)
    batch = q.shape[0]
    check.check_dtype(op, "cache_seqlens", cache_seqlens, torch.int32)
    check.check_shape(op, "cache_seqlens", cache_seqlens, (batch,), f"must have shape ({batch},)")
    check.check_same_device(op, "cache_seqlens", cache_seqlens, q)
    if block_table is not None:
        check.check_dtype(op, "block_table", block_table, torch.int32)
        check.check_same_device(op, "block_table", block_table, q)

        def message() -> str:
            return (
                f"{op}: block_table must have shape ({batch}, blocks), got "
                f"{tuple(block_table.shape)}"
            )

        torch._check(block_table.dim() == 2, message)
        torch._check(block_table.shape[0] == batch, message)
    else:
        torch._check(
            k_cache.shape[0] == batch,
            lambda: (
                f"{op}: k_cache must have {q_name}'s batch size {batch} without a block_table, got "
                f"shape {tuple(k_cache.shape)}"
            ),
        )


def _check_scale(op: str, name: str, scale: Tensor | None, cache: Tensor, q: Tensor) -> None:
    wanted = cache.dtype == torch.int8
    torch._check(
        (scale is not None) == wanted,
        lambda: (
            f"{op}: {name} must {'' if wanted else 'not '}be given beside "
            f"{'an int8' if wanted else 'a floating'} cache"
        ),
    )
    if scale is not None:
        check.check_dtype(op, name, scale, torch.float32)
        check.check_same_device(op, name, scale, q)
        shape = tuple(cache.shape[:3])
        why = f"must have shape {shape}, k_cache's without the last dimension"
        check.check_shape(op, name, scale, shape, why)


@torch.library.register_fake("pybigmodel::attention_decode")
def _attention_decode_fake(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    new_tokens: int,
    window_left: int,
    softcap: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    op = "attention_decode"
    caches = (k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table)
    _check_caches(op, "q", q, *caches)
    heads, kv_heads = q.shape[1], k_cache.shape[1]
    torch._check(
        heads % kv_heads == 0 if kv_heads else heads == 0,
        lambda: f"{op}: q's heads must be a multiple of k_cache's {kv_heads}, got {heads}",
    )
    torch._check(new_tokens >= 0, lambda: f"{op}: new_tokens must be at least 0, got {new_tokens}")
    check_options(
        op, q, q.shape[0], heads, alibi_slopes, None, window_left, 0, True, softcap, 0.0, scale, 0
    )
    rows = q.shape[:-1]
    return q.new_empty((*rows, v_cache.shape[-1])), q.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("pybigmodel::attention_append_")
def _attention_append_fake(
    k_cache: Tensor,
    v_cache: Tensor,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    k: Tensor,
    v: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
) -> None:
    op = "attention_append_"
    _check_caches(op, "k", k, k_cache, v_cache, k_scale, v_scale, cache_seqlens, block_table)
    for name, tokens, into in (("k", k, "k_cache"), ("v", v, "v_cache")):
        cache = k_cache if into == "k_cache" else v_cache
        check.check_dim(op, name, tokens, 4)
        check.check_dtype(op, name, tokens, k.dtype)
        check.check_same_device(op, name, tokens, k)
        shape = (k.shape[0], cache.shape[1], k.shape[2], cache.shape[3])
        check.check_shape(op, name, tokens, shape, f"must have shape {shape} to go into {into}")
    written = {"k_cache": k_cache, "v_cache": v_cache, "k_scale": k_scale, "v_scale": v_scale}
    for name, tensor in written.items():
        for at in range(0 if tensor is None else tensor.dim()):
            assert tensor is not None
            torch._check(
                tensor.stride(at) != 0 or tensor.shape[at] <= 1,
                lambda name=name, tensor=tensor, at=at: (
                    f"{op}: {name} is written, and must have a place for each element; got stride "
                    f"0 in dimension {at} of shape {tuple(tensor.shape)}"
                ),
            )


# --- autocast: to the cache's dtype, which cannot follow ------------------------------------------

_library = torch.library.Library("pybigmodel", "IMPL")


def _register_autocast(name: str, op: Any, cache: int, positions: tuple[int, ...]) -> None:
    for device in ("cpu", "cuda"):

        def kernel(*args: Any, device: str = device) -> Any:
            dtype = args[cache].dtype
            if not dtype.is_floating_point:
                dtype = torch.get_autocast_dtype(device)
            with below_autocast(device):
                return op(
                    *(
                        cast(arg, device, dtype) if at in positions else arg
                        for at, arg in enumerate(args)
                    )
                )

        _library.impl(name, kernel, f"Autocast{device.upper()}")


_register_autocast("attention_decode", _attention_decode, 1, (0,))
_register_autocast("attention_append_", _attention_append_, 0, (4, 5))
