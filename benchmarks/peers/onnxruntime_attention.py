"""ONNX Runtime's three attentions, fp32: ONNX's Attention, MultiHeadAttention, and
GroupQueryAttention, which decodes with its cache written in place."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from attention_shapes import Attention, Decode
from onnx import helper
from onnxruntime import OrtValue
from torch import Tensor

from peers import Contender, Errors, Unavailable
from peers.onnx_graph import FLOAT, INT32, MICROSOFT, Shapes, serialized
from peers.onnxruntime_session import bound, session
from peers.torch_attention import caches

_OPSET, _IR_VERSION = 23, 11  # the first with Attention


def _check_precision(precision: str) -> None:
    if precision != "fp32":
        raise Unavailable("its CPU provider has no bf16 attention on x86")


def _value(tensor: Tensor | np.ndarray) -> OrtValue:
    if isinstance(tensor, Tensor):
        tensor = tensor.contiguous().numpy()
    return OrtValue.ortvalue_from_numpy(tensor)


def _packed(x: Tensor) -> Tensor:
    """(B, H, S, D) as (B, S, H·D), the layout of all but Attention."""
    return x.transpose(1, 2).flatten(2)


def _contender(problem: Attention, node: Any, packed: bool) -> Contender:
    data = problem.data
    inputs = {name: _packed(x) if packed else x for name, x in zip("qkv", data.qkv, strict=True)}
    shapes: Shapes = {name: (x.shape, FLOAT) for name, x in inputs.items()}
    outputs: Shapes = {"y": shapes["q"]}
    values = {name: _value(x) for name, x in inputs.items()}
    if node.op_type == "GroupQueryAttention":
        # Without a past it still wants to know where each sequence ends, and returns the cache.
        shapes |= {"ends": ([problem.b], INT32), "total": ([], INT32)}
        values["ends"] = _value(np.full(problem.b, problem.s - 1, np.int32))
        values["total"] = _value(np.array(problem.s, np.int32))
        outputs |= {name: (data.k.shape, FLOAT) for name in ("keys", "values")}
    model = serialized([node], shapes, outputs, opset=_OPSET, ir_version=_IR_VERSION)
    results = {
        name: _value(np.zeros(dimensions, np.float32)) for name, (dimensions, _) in outputs.items()
    }
    call = bound(session(model, problem.threads), values, results)

    def errors() -> Errors:
        call()
        y = torch.from_numpy(results["y"].numpy())
        if packed:
            y = y.unflatten(2, (problem.heads, problem.d)).transpose(1, 2)
        return Errors.of([y], [data.exact])

    return Contender([call], errors)


def build(problem: Attention) -> Contender:
    _check_precision(problem.precision)
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"], is_causal=int(problem.causal))
    return _contender(problem, node, packed=False)


def build_mha(problem: Attention) -> Contender:
    _check_precision(problem.precision)
    node = helper.make_node(
        "MultiHeadAttention",
        ["q", "k", "v"],
        ["y"],
        domain=MICROSOFT,
        num_heads=problem.heads,
        unidirectional=int(problem.causal),
    )
    return _contender(problem, node, packed=True)


def build_gqa(problem: Attention) -> Contender:
    _check_precision(problem.precision)
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "", "", "ends", "total"],
        ["y", "keys", "values"],
        domain=MICROSOFT,
        num_heads=problem.heads,
        kv_num_heads=problem.heads,
        causal=int(problem.causal or problem.window is not None),
        local_window_size=-1 if problem.window is None else problem.window,
    )
    return _contender(problem, node, packed=True)


def build_decode(problem: Decode) -> Contender:
    """The last token's key and value come as inputs and are written into the cache."""
    _check_precision(problem.precision)
    b, kv_heads, keys, d = problem.data.k.shape
    node = helper.make_node(
        "GroupQueryAttention",
        ["q", "k", "v", "keys", "values", "ends", "total"],
        ["y", "new_keys", "new_values"],
        domain=MICROSOFT,
        num_heads=problem.heads,
        kv_num_heads=kv_heads,
    )
    data = problem.data
    new = {"q": data.q, "k": data.k[:, :, -1:], "v": data.v[:, :, -1:]}
    values = {name: _value(_packed(x)) for name, x in new.items()}
    values["ends"] = _value(np.full(b, keys - 1, np.int32))
    values["total"] = _value(np.array(keys, np.int32))
    shapes: Shapes = {name: (_packed(x).shape, FLOAT) for name, x in new.items()}
    cache: Shapes = {name: (data.k.shape, FLOAT) for name in ("keys", "values")}
    ends: Shapes = {"ends": ([b], INT32), "total": ([], INT32)}
    outputs: Shapes = {"y": shapes["q"]} | {f"new_{name}": s for name, s in cache.items()}
    model = serialized(
        [node], {**shapes, **cache, **ends}, outputs, opset=_OPSET, ir_version=_IR_VERSION
    )
    y = _value(np.zeros((b, 1, problem.heads * d), np.float32))
    running = session(model, problem.threads)
    calls = []
    for k, v in caches(problem):
        # The same memory as input and output: nothing is copied.
        kv = {"keys": _value(k), "values": _value(v)}
        results = {"y": y} | {f"new_{name}": value for name, value in kv.items()}
        calls.append(bound(running, values | kv, results))

    def errors() -> Errors:
        calls[0]()
        result = torch.from_numpy(y.numpy()).view(b, problem.heads, 1, d)
        return Errors.of([result], [data.exact])

    return Contender(calls, errors)
