"""aten::_weight_int8pack_mm, torch's own int8 weight-only kernel (bf16 activations; no bias)."""

from __future__ import annotations

from functools import partial

import torch
from shapes import Product

from peers import Contender


def build(problem: Product) -> Contender:
    data = problem.data
    scale = data.weight.abs().amax(1) / 127
    quantized = (data.weight / scale[:, None]).round().clamp(-127, 127).to(torch.int8)
    x, scale = data.x.bfloat16(), scale.bfloat16()
    weights = [quantized.clone() for _ in range(problem.copies)]
    multiply = torch.ops.aten._weight_int8pack_mm.default
    calls = [partial(multiply, x, w, scale) for w in weights]
    return Contender.of_linear(
        problem,
        calls,
        lambda: calls[0]().float() + data.bias,
        "bf16 activations, without the bias",
    )
