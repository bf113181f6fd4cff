"""ONNX Runtime's poolings: fp32 in its blocked layout, bytes in channels_last."""

from __future__ import annotations

from pool_shapes import Pooling

from peers import Contender, Unavailable, onnx_pool
from peers.onnxruntime_images import (
    block,
    contender,
    from_blocks,
    from_channels_last,
    to_blocks,
    to_channels_last,
)


def build(problem: Pooling) -> Contender:
    """In the layouts that it has within a model of convolutions; alone it would run in planes."""
    if problem.precision == "bf16":
        raise Unavailable("its CPU provider has no bf16 poolings on x86")
    if problem.precision == "int8":
        model = onnx_pool.bytes_channels_last(problem)
        return contender(problem, model, to_channels_last, from_channels_last)
    if problem.c % block():
        raise Unavailable(f"its blocks of {block()} would pad the channels")
    return contender(problem, onnx_pool.blocked(problem), to_blocks, from_blocks)
