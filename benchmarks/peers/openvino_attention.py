"""OpenVINO's ScaledDotProductAttention, fp32 and bf16 (in and out as well)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import openvino
from attention_shapes import Attention, Decode
from openvino import opset13 as ov
from torch import Tensor

from peers import Contender, Errors
from peers.openvino_request import ELEMENTS, compiled, empty, from_torch, to_torch
from peers.torch_attention import caches, decode_contender, grouped


def _calls(
    q: Tensor,
    caches: Sequence[tuple[Tensor, Tensor]],
    precision: str,
    threads: int,
    causal: bool = False,
    mask: Tensor | None = None,
) -> tuple[list[Callable[[], object]], openvino.Tensor]:
    """One call for each pair of keys and values, and where they leave their output."""
    element = ELEMENTS[precision]
    parameters = [ov.parameter(list(t.shape), element) for t in (q, *caches[0])]
    constant = [] if mask is None else [ov.constant(mask.numpy())]
    attention = ov.scaled_dot_product_attention(*parameters, *constant, causal=causal)
    model = openvino.Model([attention], parameters)
    query, y = from_torch(q, precision), empty(q.shape, precision)
    program = compiled(model, threads, precision)
    calls = []
    for k, v in caches:
        request = program.create_infer_request()
        for i, tensor in enumerate((query, from_torch(k, precision), from_torch(v, precision))):
            request.set_input_tensor(i, tensor)
        request.set_output_tensor(0, y)
        calls.append(request.infer)
    return calls, y


def build(problem: Attention) -> Contender:
    q, *kv = problem.data.qkv
    windowed = problem.window is not None
    calls, y = _calls(
        q,
        [tuple(kv)],
        problem.precision,
        problem.threads,
        causal=problem.causal and not windowed,
        mask=problem.data.mask if windowed else None,
    )

    def errors() -> Errors:
        calls[0]()
        return Errors.of([to_torch(y, problem.precision)], [problem.data.exact])

    return Contender(calls, errors, note="a bool mask of (S, S)" if windowed else "")


def build_decode(problem: Decode) -> Contender:
    """Its op has as many key as query heads, so the query heads of a group are rows of one."""
    calls, y = _calls(grouped(problem), caches(problem), problem.precision, problem.threads)

    def result() -> Tensor:
        calls[0]()
        return to_torch(y, problem.precision)

    exact = decode_contender(problem, [result])
    return Contender(calls, exact.errors)
