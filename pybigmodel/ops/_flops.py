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
