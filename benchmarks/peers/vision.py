"""Convolutional networks in torch, ONNX Runtime and OpenVINO, and optimised by pybigmodel."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from vision import Logits, Vision, images

import pybigmodel as pbm
from peers import Contender
from peers.onnx_export import onnx_file, statically_quantized

_NAMES = ("x",)
_PRECISIONS = ("fp32", "bf16", "int8")
_DTYPES = {"bf16": torch.bfloat16}
_CALIBRATION = 32  # images, other than those that are compared


def _contender(
    problem: Vision, call: Callable[[], Any], logits: Logits, precision: str
) -> Contender:
    return Contender([call], lambda: problem.data.errors(logits), precision=precision)


def _torch(
    problem: Vision,
    model: Callable[[Tensor], Tensor],
    precision: str = "fp32",
    layout: torch.memory_format = torch.contiguous_format,
    dtype: torch.dtype = torch.float32,
) -> Contender:
    def arranged(x: Tensor) -> Tensor:
        return x.to(dtype).contiguous(memory_format=layout)

    call = partial(model, arranged(problem.data.input))
    return _contender(problem, call, lambda x: model(arranged(x)), precision)


def build_eager(problem: Vision) -> Contender:
    return _torch(problem, problem.data.original)


def _channels_last(problem: Vision) -> nn.Module:
    return problem.data.copy().to(memory_format=torch.channels_last)


def build_channels_last(problem: Vision) -> Contender:
    return _torch(problem, _channels_last(problem), layout=torch.channels_last)


def build_bf16(problem: Vision) -> Contender:
    """Everything in bfloat16, in the layout that is the faster one."""
    model = _channels_last(problem).bfloat16()
    return _torch(problem, model, "bf16", torch.channels_last, torch.bfloat16)


def build_compiled(problem: Vision) -> Contender:
    """Frozen, which folds the normalisations and packs the weights; inductor picks the layout."""
    from peers.torch_compile import frozen

    return _torch(problem, frozen(problem.data.copy(), problem.data.input))


@lru_cache(maxsize=3)
def _optimized(problem: Vision, precision: str) -> nn.Module:
    """In bf16 everything is in that dtype, as the peers."""
    model, dtype = problem.data.copy(), _DTYPES.get(precision, torch.float32)
    example = problem.data.input.to(dtype).contiguous(memory_format=torch.channels_last)
    products = "int8" if precision == "int8" else "fp32"
    options = {"example_inputs": example, "inplace": True, "keep_original": False}
    model = pbm.optimize(model.to(dtype), products, **options)
    if precision == "int8":  # on what ONNX Runtime's is
        pbm.calibrate(model, images(_CALIBRATION, seed=2).split(problem.b))
    return model


def build_ours(problem: Vision, precision: str, frozen: bool = False) -> Contender:
    model = _optimized(problem, precision)
    dtype = _DTYPES.get(precision, torch.float32)
    run = pbm.freeze(model) if frozen else model
    return _torch(problem, run, precision, torch.channels_last, dtype)


def build_our_backend(problem: Vision) -> Contender:
    model = torch.compile(problem.data.copy(), backend="pybigmodel")
    return _torch(problem, model, layout=torch.channels_last)


# --- ONNX Runtime and OpenVINO ------------------------------------------------------------------


def _exported(problem: Vision) -> bytes:
    """With the normalisations folded into the convolutions."""
    with onnx_file(problem.data.original, [problem.data.input], _NAMES) as path:
        return path.read_bytes()


def _statically_quantized(problem: Vision) -> bytes:
    """Every op that ONNX Runtime has in int8."""
    examples = [[batch] for batch in images(_CALIBRATION, seed=2).split(problem.b)]
    with onnx_file(problem.data.original, [problem.data.input], _NAMES) as path:
        return statically_quantized(path, examples, _NAMES).read_bytes()


def _int8(problem: Vision) -> bytes:
    # ONNX Runtime calibrates, and cannot beside its process-wide pool (see onnxruntime_session).
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as elsewhere:
        without_data = replace(problem)
        return elsewhere.submit(_statically_quantized, without_data).result()


def _onnxruntime(problem: Vision, model: bytes, precision: str) -> Contender:
    from onnxruntime import OrtValue

    from peers.onnxruntime_session import bound, session

    running = session(model, problem.threads)
    x = OrtValue.ortvalue_from_numpy(problem.data.input.numpy().copy())
    y = OrtValue.ortvalue_from_numpy(problem.data.original(problem.data.input).numpy().copy())
    call = bound(running, {"x": x}, {"y": y})

    def logits(batch: Tensor) -> Tensor:
        x.update_inplace(batch.numpy())
        call()
        return torch.from_numpy(y.numpy())

    return _contender(problem, call, logits, precision)


def build_onnxruntime(problem: Vision) -> Contender:
    return _onnxruntime(problem, _exported(problem), "fp32")


def build_onnxruntime_int8(problem: Vision) -> Contender:
    return _onnxruntime(problem, _int8(problem), "int8")


def _openvino(problem: Vision, model: Any, precision: str, products: str) -> Contender:
    from peers.openvino_request import compiled, from_torch

    request = compiled(model, problem.threads, products).create_infer_request()
    x = from_torch(problem.data.input, "fp32")
    request.set_input_tensor(0, x)

    def logits(batch: Tensor) -> Tensor:
        x.data[:] = batch.numpy()
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data)

    return _contender(problem, request.infer, logits, precision)


def build_openvino(problem: Vision, precision: str) -> Contender:
    import openvino

    x = problem.data.input
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing
        model = openvino.convert_model(
            problem.data.original, example_input=(x,), input=[tuple(x.shape)]
        )
    return _openvino(problem, model, precision, precision)


def build_openvino_int8(problem: Vision) -> Contender:
    from peers.openvino_request import core

    return _openvino(problem, core().read_model(_int8(problem), b""), "int8", "fp32")


BUILDERS: dict[str, Callable[[Vision], Contender]] = {
    "torch_eager": build_eager,
    "torch_channels_last": build_channels_last,
    "torch_eager_bf16": build_bf16,
    "torch_compile": build_compiled,
    "onnxruntime_fp32": build_onnxruntime,
    "onnxruntime_int8": build_onnxruntime_int8,
    "openvino_fp32": partial(build_openvino, precision="fp32"),
    "openvino_bf16": partial(build_openvino, precision="bf16"),
    "openvino_int8": build_openvino_int8,
    "pybigmodel_compile": build_our_backend,
    **{f"pybigmodel_{p}": partial(build_ours, precision=p) for p in _PRECISIONS},
    **{
        f"pybigmodel_frozen_{p}": partial(build_ours, precision=p, frozen=True) for p in _PRECISIONS
    },
}
