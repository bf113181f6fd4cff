"""F.scaled_dot_product_attention, and additive attention composed from torch's ops."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from attention_shapes import FORWARD_BACKWARD, Additive, Attention, Decode, additive_attention
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from peers import Contender, Errors
from peers.torch_eager import DTYPES
from peers.training import forward_backward


def attention_contender(
    problem: Attention, function: Callable[..., Tensor], **options: Any
) -> Contender:
    """Of `function(q, k, v)` in the problem's dtype."""
    data, dtype = problem.data, DTYPES[problem.precision]
    inputs = [t.to(dtype, copy=True) for t in data.qkv]
    if problem.op == FORWARD_BACKWARD:
        call = forward_backward(function, inputs, data.grad.to(dtype))
        return Contender(
            [call], lambda: Errors.of(call(), data.exact_gradients), records_memory=True, **options
        )
    forward = partial(function, *inputs)
    return Contender([forward], lambda: Errors.of([forward()], [data.exact]), **options)


def build(problem: Attention) -> Contender:
    options: dict[str, Any] = {}
    note = ""
    if problem.window is not None:
        options["attn_mask"], note = problem.data.mask, "a bool mask of (S, S)"
    elif problem.causal:
        options["is_causal"] = True
    return attention_contender(problem, partial(scaled_dot_product_attention, **options), note=note)


def build_flex(problem: Attention) -> Contender:
    """flex_attention by inductor, which leaves out the blocks of which nothing is seen."""
    assert problem.window is not None
    window, s = problem.window, problem.s

    def seen(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return (j <= i) & (i - j < window)

    blocks = create_block_mask(seen, None, None, s, s, device="cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about parts of itself
        torch.compiler.reset()
        compiled = torch.compile(flex_attention, dynamic=False)
        contender = attention_contender(problem, partial(compiled, block_mask=blocks))
        contender.calls[0]()
    return contender


def caches(problem: Decode) -> list[tuple[Tensor, Tensor]]:
    """As many copies of the keys and values as are in rotation."""
    dtype = DTYPES[problem.precision]
    halves = problem.data.k, problem.data.v
    return [tuple(t.to(dtype, copy=True) for t in halves) for _ in range(problem.copies)]


def decode_contender(problem: Decode, calls: Sequence[Callable[[], Tensor]]) -> Contender:
    exact = problem.data.exact
    return Contender(calls, lambda: Errors.of([calls[0]().reshape(exact.shape)], [exact]))


def build_decode(problem: Decode) -> Contender:
    q = problem.data.q.to(DTYPES[problem.precision])
    attend = partial(scaled_dot_product_attention, enable_gqa=True)
    return decode_contender(problem, [partial(attend, q, *kv) for kv in caches(problem)])


def grouped(problem: Decode) -> Tensor:
    """The query heads of a group as rows of one head, which see the same keys: (B, Hkv, G, D)."""
    group = problem.heads // problem.kv_heads
    return problem.data.q.reshape(problem.b, problem.kv_heads, group, problem.d)


def build_decode_grouped(problem: Decode) -> Contender:
    q = grouped(problem).to(DTYPES[problem.precision])
    attend = scaled_dot_product_attention
    return decode_contender(problem, [partial(attend, q, *kv) for kv in caches(problem)])


def additive_contender(problem: Additive, function: Callable[..., Tensor]) -> Contender:
    data = problem.data
    if "backward" in problem.op:
        step = forward_backward(function, data.inputs, data.grad)
        return Contender(
            [step], lambda: Errors.of(step(), data.exact_gradients), records_memory=True
        )
    call = partial(function, *data.inputs)
    return Contender([call], lambda: Errors.of([call()], [data.exact]), records_memory=True)


def build_additive(problem: Additive) -> Contender:
    return additive_contender(problem, additive_attention)


def build_additive_compiled(problem: Additive) -> Contender:
    """Inductor fuses the sum and the tanh into the reduction over H, as nobody writes by hand."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the compiler's, about parts of itself
        torch.compiler.reset()
        contender = additive_contender(problem, torch.compile(additive_attention, dynamic=False))
        contender.calls[0]()
    return contender
