"""ONNX Runtime: fp32 in its blocked layout, static int8 in channels_last."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import torch
from conv_shapes import Convolution
from onnxruntime import OrtValue
from torch import Tensor

from peers import Contender, Errors, Unavailable, onnx_conv
from peers.onnxruntime_session import bound, session
from pybigmodel import _native

_View = Callable[[Tensor], Tensor]


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
    block = 16 if _native.cpu_features()["avx512f"] else 8  # MlasNchwcGetBlockSize
    reads_blocks = "ReorderInput" in ends
    if problem.n % block or (reads_blocks and problem.c % block):
        raise Unavailable(f"its blocks of {block} would pad the channels")
    convolution.input[0], convolution.output[0] = "x", "y"
    del model.graph.node[:]
    model.graph.node.append(convolution)

    def blocks(x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        return x.view(b, c // block, block, h, w).permute(0, 1, 3, 4, 2).reshape(x.shape)

    def plain(y: Tensor) -> Tensor:
        b, c, h, w = y.shape
        return y.view(b, c // block, h, w, block).permute(0, 1, 4, 2, 3).reshape(y.shape)

    return _contender(problem, model.SerializeToString(), blocks if reads_blocks else None, plain)


def build_static(problem: Convolution) -> Contender:
    return _contender(
        problem,
        onnx_conv.static_channels_last(problem),
        lambda x: x.permute(0, 2, 3, 1),
        lambda y: y.permute(0, 3, 1, 2),
        note="the scales are known beforehand; its output is rounded to int8 as well",
    )


def _optimized(model: bytes, threads: int) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        session(model, threads, optimized=path)
        return onnx.load(path)


def _contender(
    problem: Convolution, model: bytes, arrange: _View | None, plain: _View, note: str = ""
) -> Contender:
    """arrange: x as the model reads it, None: as it is; plain: its y as (B, N, H, W)."""
    x = problem.data.x if arrange is None else arrange(problem.data.x).contiguous()
    running = session(model, problem.threads)
    y = OrtValue.ortvalue_from_numpy(np.zeros(running.get_outputs()[0].shape, np.float32))
    calls = [
        bound(running, {"x": OrtValue.ortvalue_from_numpy(x.numpy().copy())}, {"y": y})
        for _ in range(problem.copies)
    ]

    def errors() -> Errors:
        calls[0]()
        return Errors.of([plain(torch.from_numpy(y.numpy()))], [problem.data.exact])

    return Contender(calls, errors, note)
