"""What torch.utils.flop_counter counts for the ops: a product's multiplications and additions."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pybigmodel._torch_private import traced_types

Shape = tuple[int, ...]

_ops = torch.ops.pybigmodel


@register_flop_formula(_ops.linear)
def linear(input: Shape, weight: Shape, *rest: Any, **kwargs: Any) -> int:
    return 2 * prod(input) * weight[0]


@register_flop_formula(_ops.linear_backward)
def _linear_backward(
    grad_output: Shape,
    input: Shape,
    weight: Shape,
    precision: int,
    need_input: bool,
    need_weight: bool,
    *rest: Any,
    **kwargs: Any,
) -> int:
    return linear(input, weight) * (need_input + need_weight)


@register_flop_formula(_ops.linear_packed)
def _linear_packed(
    input: Shape, packed_weight: Shape, out_features: int, *rest: Any, **kwargs: Any
) -> int:
    return 2 * prod(input) * out_features


@register_flop_formula([_ops.int8_linear, _ops.int8_weight_only_linear])
def _int8_linear(
    input: Shape, packed_weight: Shape, weight_scale: Shape, *rest: Any, **kwargs: Any
) -> int:
    return 2 * prod(input) * weight_scale[0]


@register_flop_formula(_ops.int8_conv)
def _int8_conv(
    input: Shape,
    packed_weight: Shape,
    weight_scale: Shape,
    bias: Shape | None,
    residual: Shape | None,
    window: Shape,
    groups: int,
    *rest: Any,
    out_shape: Shape,
    **kwargs: Any,
) -> int:
    return 2 * prod(out_shape) * (input[1] // groups) * prod(window[::5])


@register_flop_formula(_ops.conv)
def conv(input: Shape, weight: Shape, *rest: Any, out_shape: Shape, **kwargs: Any) -> int:
    return 2 * prod(out_shape) * prod(weight[1:])


@register_flop_formula(_ops.conv_packed)
def _conv_packed(
    input: Shape,
    packed_weight: Shape,
    out_channels: int,
    kernel_size: Shape,
    bias: Shape | None,
    residual: Shape | None,
    stride: Shape,
    padding: Shape,
    dilation: Shape,
    groups: int,
    *rest: Any,
    out_shape: Shape,
    **kwargs: Any,
) -> int:
    return 2 * prod(out_shape) * (input[1] // groups) * prod(kernel_size)


@register_flop_formula(_ops.conv_backward)
def _conv_backward(
    grad_output: Shape, input: Shape, weight: Shape, *rest: Any, **kwargs: Any
) -> int:
    # rest ends in need_input, need_weight, need_bias.
    return 2 * prod(grad_output) * prod(weight[1:]) * sum(map(int, rest[-3:-1]))


@register_flop_formula(_ops.conv_transpose)
def _conv_transpose(input: Shape, weight: Shape, *rest: Any, **kwargs: Any) -> int:
    return 2 * prod(input) * prod(weight[1:])


@register_flop_formula(_ops.conv_transpose_backward)
def _conv_transpose_backward(
    grad_output: Shape, input: Shape, weight: Shape, *rest: Any, **kwargs: Any
) -> int:
    return _conv_transpose(input, weight) * sum(map(int, rest[-3:-1]))


def _pairs(starts_q: Tensor, starts_k: Tensor, rows: int, keys: int) -> int:
    """Pairs of a query and a key of one sequence; those of sequences of one length where the
    starts have no values."""
    if isinstance(starts_q, traced_types) or starts_q.is_meta:
        return rows * keys // max(starts_q.shape[0] - 1, 1)
    return int((starts_q.diff().long() * starts_k.diff().long()).sum())


# As torch counts its own: every pair, masked or not.
@register_flop_formula(_ops.attention)
def _attention(q: Shape, k: Shape, v: Shape, *rest: Any, **kwargs: Any) -> int:
    return 2 * prod(q[:3]) * k[2] * (q[3] + v[3])


@register_flop_formula(_ops.attention_backward)
def _attention_backward(
    grad_out: Shape, grad_lse: Shape | None, q: Shape, k: Shape, v: Shape, *rest: Any, **kwargs: Any
) -> int:
    # The scores again, grad_out·v; then the gradients of q, k and v. That of a mask takes two more.
    need_mask = rest[-1] is True and rest[2] is not None
    return 2 * prod(q[:3]) * k[2] * (q[3] * (3 + need_mask) + v[3] * (2 + need_mask))


@register_flop_formula(_ops.attention_varlen, get_raw=True)
def _attention_varlen(
    q: Tensor, k: Tensor, v: Tensor, starts_q: Tensor, starts_k: Tensor, *rest: Any, **kwargs: Any
) -> int:
    pairs = _pairs(starts_q, starts_k, q.shape[0], k.shape[0])
    return 2 * q.shape[1] * pairs * (q.shape[2] + v.shape[2])


@register_flop_formula(_ops.attention_varlen_backward, get_raw=True)
def _attention_varlen_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    starts_q: Tensor,
    starts_k: Tensor,
    *rest: Any,
    **kwargs: Any,
) -> int:
    pairs = _pairs(starts_q, starts_k, q.shape[0], k.shape[0])
    return 2 * q.shape[1] * pairs * (3 * q.shape[2] + 2 * v.shape[2])


@register_flop_formula(_ops.attention_decode, get_raw=True)
def _attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    block_table: Tensor | None,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
    alibi_slopes: Tensor | None,
    new_tokens: int,
    *rest: Any,
    **kwargs: Any,
) -> int:
    """Of the tokens that are in the cache, or of its room where the lengths have no values."""
    if isinstance(cache_seqlens, traced_types) or cache_seqlens.is_meta:
        blocks = 1 if block_table is None else block_table.shape[1]
        keys = q.shape[0] * k_cache.shape[2] * blocks
    else:
        keys = int(cache_seqlens.sum()) + q.shape[0] * new_tokens
    return 2 * q.shape[1] * q.shape[2] * keys * (q.shape[3] + v_cache.shape[3])


@register_flop_formula(_ops.additive_attention)
def _additive_attention(query: Shape, key: Shape, value: Shape, *rest: Any, **kwargs: Any) -> int:
    return 2 * prod(query[:2]) * key[1] * (query[2] + value[2])


@register_flop_formula(_ops.additive_attention_backward)
def _additive_attention_backward(
    grad_out: Shape,
    grad_lse: Shape | None,
    query: Shape,
    key: Shape,
    value: Shape,
    v: Shape,
    attn_mask: Shape | None,
    dropout_seed: Shape | None,
    dropout_p: float,
    need_hidden: bool,
    need_value: bool,
    *rest: Any,
    **kwargs: Any,
) -> int:
    # The scores again, grad_out·value; three sums over hidden; one over the values' columns.
    hidden, columns = query[2] * (1 + 3 * need_hidden), value[2] * (1 + need_value)
    return 2 * prod(query[:2]) * key[1] * (hidden + columns)
