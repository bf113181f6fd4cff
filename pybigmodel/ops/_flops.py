"""What torch.utils.flop_counter counts for the ops: a product's multiplications and additions."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch.utils.flop_counter import register_flop_formula

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
