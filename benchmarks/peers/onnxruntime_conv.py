"""ONNX Runtime: fp32 in its blocked layout, static int8 in channels_last, transposed in planes."""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx
from conv_shapes import Convolution
from conv_transpose_shapes import TransposedConvolution

from peers import Contender, Unavailable, onnx_conv
from peers.onnxruntime_images import (
    block,
    contender,
    from_blocks,
    from_channels_last,
    to_blocks,
    to_channels_last,
)
from peers.onnxruntime_session import session


def build(problem: Convolution) -> Contender:
    """Within a model its convolutions pass blocks of channels on to each other, so the reordering
    that a model of a single one does at both ends is taken out of it."""
    if problem.precision != "fp32":
        raise Unavailable("its CPU provider has no bf16 Conv on x86")
    model = _optimized(onnx_conv.fp32(problem), problem.threads)
    (convolution,) = (node for node in model.graph.node if node.op_type == "Conv")
    ends = [node.op_type for node in model.graph.node if node is not convolution]
    if ends not in (["ReorderInput", "ReorderOutput"], ["ReorderOutput"]):
        raise Unavailable(f"it has no blocked convolution of this shape, but {ends}")
    reads_blocks = "ReorderInput" in ends
    if problem.n % block() or (reads_blocks and problem.c % block()):
        raise Unavailable(f"its blocks of {block()} would pad the channels")
    convolution.input[0], convolution.output[0] = "x", "y"
    del model.graph.node[:]
    model.graph.node.append(convolution)
    arrange = to_blocks if reads_blocks else None
    return contender(problem, model.SerializeToString(), arrange, from_blocks)


def build_static(problem: Convolution) -> Contender:
    return contender(
        problem,
        onnx_conv.static_channels_last(problem),
        to_channels_last,
        from_channels_last,
        note="the scales are known beforehand; its output is rounded to int8 as well",
    )


def build_transposed(problem: TransposedConvolution) -> Contender:
    if problem.precision != "fp32":
        raise Unavailable("its CPU provider has no bf16 ConvTranspose on x86")
    return contender(problem, onnx_conv.fp32(problem), note="in planes: it has none in blocks")


def _optimized(model: bytes, threads: int) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(model, threads, optimized=path)
        return onnx.load(path)
