"""OpenVINO with the cache as a state of the model, which its plugin makes one node of: what it does
for language models. Every call appends its key and value, so the cache grows."""

from __future__ import annotations

import numpy as np
import openvino
from attention_shapes import Decode
from openvino import opset13 as ov
from openvino.op.util import Variable, VariableInfo
from torch import Tensor

from peers import Contender, Errors
from peers.openvino_request import ELEMENTS, compiled, empty, from_torch, to_torch
from peers.torch_attention import caches


def _constant(*values: int) -> openvino.Node:
    return ov.constant(np.array(values, np.int64))


def _cached(new: openvino.Node, order: openvino.Node, problem: Decode, name: str):
    """The state with `new` appended, for each query head; and the node that stores it."""
    element = ELEMENTS[problem.precision]
    info = VariableInfo()
    info.data_shape = new.get_output_partial_shape(0)
    info.data_type = element
    info.variable_id = name
    state = Variable(info)
    nothing = ov.convert(ov.constant(np.float32(0)), element.get_type_name())
    empty_state = ov.broadcast(nothing, _constant(problem.b, problem.kv_heads, 0, problem.d))
    past = ov.gather(ov.read_value(empty_state, state), order, _constant(0))
    cache = ov.concat([past, new], 2)
    groups = _constant(1, 1, problem.heads // problem.kv_heads, 1, 1)
    shared = ov.broadcast(ov.unsqueeze(cache, _constant(2)), groups, broadcast_spec="BIDIRECTIONAL")
    heads = ov.reshape(shared, _constant(0, problem.heads, -1, problem.d), True)
    return heads, ov.assign(cache, state)


def _model(problem: Decode) -> openvino.Model:
    element, any_length = ELEMENTS[problem.precision], -1
    q, k, v = (
        ov.parameter([problem.b, heads, any_length, problem.d], element)
        for heads in (problem.heads, problem.kv_heads, problem.kv_heads)
    )
    order = ov.parameter([problem.b], openvino.Type.i32)  # of beams; the plugin looks for it
    keys, stores_k = _cached(k, order, problem, "k")
    values, stores_v = _cached(v, order, problem, "v")
    y = ov.scaled_dot_product_attention(q, keys, values)
    return openvino.Model([ov.result(y)], [stores_k, stores_v], [q, k, v, order])


def build(problem: Decode) -> Contender:
    precision, data = problem.precision, problem.data
    program = compiled(
        _model(problem),
        problem.threads,
        precision,
        KV_CACHE_PRECISION=ELEMENTS[precision].get_type_name(),
    )
    order = openvino.Tensor(np.arange(problem.b, dtype=np.int32))
    y = empty(data.q.shape, precision)

    def filled(k: Tensor, v: Tensor) -> openvino.InferRequest:
        """A request whose next call appends the last token and answers `q`."""
        request = program.create_infer_request()
        past = problem.keys - 1
        for state in request.query_state():
            half = {"k": k, "v": v}[state.name]
            state.state = from_torch(half[:, :, :past], precision)
        for i, tensor in enumerate((data.q, k[:, :, past:], v[:, :, past:])):
            request.set_input_tensor(i, from_torch(tensor, precision))
        request.set_input_tensor(3, order)
        request.set_output_tensor(0, y)
        return request

    def errors() -> Errors:
        filled(data.k, data.v).infer()
        return Errors.of([to_torch(y, precision)], [data.exact])

    calls = [filled(*kv).infer for kv in caches(problem)]
    return Contender(calls, errors, note="its cache grows by a token at every call")
