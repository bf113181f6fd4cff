"""ONNX Runtime on images: its blocked layout, and models bound to images and results."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from onnxruntime import OrtValue
from torch import Tensor

from peers import Contender, Errors
from peers.images import ImageProblem
from peers.onnxruntime_session import bound, session
from pybigmodel import _native

View = Callable[[Tensor], Tensor]


def block() -> int:
    """Channels that lie side by side (MlasNchwcGetBlockSize)."""
    return 16 if _native.cpu_features()["avx512f"] else 8


def to_blocks(x: Tensor) -> Tensor:
    b, c, h, w = x.shape
    return x.view(b, c // block(), block(), h, w).permute(0, 1, 3, 4, 2).reshape(x.shape)


def from_blocks(y: Tensor) -> Tensor:
    b, c, h, w = y.shape
    return y.view(b, c // block(), h, w, block()).permute(0, 1, 4, 2, 3).reshape(y.shape)


def to_channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def from_channels_last(y: Tensor) -> Tensor:
    return y.permute(0, 3, 1, 2)


def contender(
    problem: ImageProblem,
    model: bytes,
    arrange: View | None = None,
    plain: View | None = None,
    note: str = "",
) -> Contender:
    """arrange: x as the model reads it; plain: its y as (B, N, H, W); None: as it is."""
    x = problem.data.x if arrange is None else arrange(problem.data.x).contiguous()
    running = session(model, problem.threads)
    shape, dtype = running.get_outputs()[0].shape, x.numpy().dtype
    y = OrtValue.ortvalue_from_numpy(np.zeros(shape, dtype))
    calls = [
        bound(running, {"x": OrtValue.ortvalue_from_numpy(x.numpy().copy())}, {"y": y})
        for _ in range(problem.copies)
    ]

    def errors() -> Errors:
        calls[0]()
        result = torch.from_numpy(y.numpy())
        return Errors.of([result if plain is None else plain(result)], [problem.data.exact])

    return Contender(calls, errors, note)
