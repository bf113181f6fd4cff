"""OpenVINO, CPU plugin: models compiled for latency, tensors allocated beforehand."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np
import openvino
import torch
from torch import Tensor

ELEMENTS = {"fp32": openvino.Type.f32, "bf16": openvino.Type.bf16, "int8": openvino.Type.u8}
_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "f32"}  # of what is not int8


@cache
def core() -> openvino.Core:
    return openvino.Core()


def compiled(
    model: openvino.Model, threads: int, precision: str, **options: str
) -> openvino.CompiledModel:
    config = options | {
        "PERFORMANCE_HINT": "LATENCY",
        "NUM_STREAMS": "1",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
    }
    return core().compile_model(model, "CPU", config)


def empty(shape: Sequence[int], precision: str) -> openvino.Tensor:
    return openvino.Tensor(ELEMENTS[precision], list(shape))


def from_torch(x: Tensor, precision: str) -> openvino.Tensor:
    tensor = empty(x.shape, precision)
    if precision == "bf16":  # which numpy does not know
        tensor.data.view(np.int16)[:] = x.bfloat16().view(torch.int16).numpy()
    else:
        tensor.data[:] = x.numpy()
    return tensor


def to_torch(tensor: openvino.Tensor, precision: str) -> Tensor:
    if precision == "bf16":
        return torch.from_numpy(tensor.data.view(np.int16).copy()).view(torch.bfloat16)
    return torch.from_numpy(tensor.data.copy())
