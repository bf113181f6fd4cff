"""pybigmodel's ops, called as a user calls them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from shapes import Product

from peers import Contender
from peers.torch_eager import DTYPES
from pybigmodel import ops


def _packed(problem: Product) -> Contender:
    dtype = DTYPES[problem.precision]
    data = problem.data
    x, bias = data.x.to(dtype), data.bias.to(dtype)
    weight = data.weight.to(dtype)
    packed = [ops.pack_linear_weight(weight, problem.precision) for _ in range(problem.copies)]
    return Contender.of_linear(
        problem, [partial(ops.linear_packed, x, w, problem.n, bias) for w in packed]
    )


def _int8(problem: Product, op: Callable[..., Any]) -> Contender:
    data = problem.data
    quantized, scale = ops.quantize_weight(data.weight)
    packed = [ops.pack_int8_linear_weight(quantized) for _ in range(problem.copies)]
    return Contender.of_linear(problem, [partial(op, data.x, w, scale, data.bias) for w in packed])


def build(problem: Product) -> Contender:
    if problem.op == "int8_linear":
        return _int8(problem, ops.int8_linear)
    if problem.op == "int8_weight_only_linear":
        return _int8(problem, ops.int8_weight_only_linear)
    return _packed(problem)
