"""Encoders in torch, ONNX Runtime and OpenVINO, and optimised by pybigmodel."""

from __future__ import annotations

import multiprocessing
import warnings
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from encoders import Encoder
from torch import Tensor

import pybigmodel as pbm
from peers import Contender
from peers.onnx_export import onnx_file, statically_quantized

_NAMES = ("ids", "mask")  # of the inputs


def _contender(
    problem: Encoder, call: Callable[[], Any], precision: str, result: Callable[[], Tensor]
) -> Contender:
    return Contender([call], lambda: problem.data.errors(result()), precision=precision)


def _torch(problem: Encoder, model: torch.nn.Module, precision: str) -> Contender:
    call = partial(model, *problem.data.inputs)
    return _contender(problem, call, precision, call)


def build_eager(problem: Encoder) -> Contender:
    return _torch(problem, problem.data.original, "fp32")


def build_eager_bf16(problem: Encoder) -> Contender:
    return _torch(problem, problem.data.with_attention("sdpa").bfloat16(), "bf16")


def build_ours(problem: Encoder, precision: str) -> Contender:
    """Layers by pbm.optimize, attention through transformers' interface; int8 has it in bf16."""
    products = None if precision == "fp32" else "bf16"
    name = f"pybigmodel_{products or 'fp32'}"
    pbm.integrations.register_transformers(name, precision=products)
    model = problem.data.with_attention(name)
    optimized = pbm.optimize(model, precision, example_inputs=problem.data.inputs, inplace=True)
    return _torch(problem, optimized, precision)


def build_ours_bf16_tensors(problem: Encoder) -> Contender:
    """Everything in bfloat16, as a model is that was saved so."""
    pbm.integrations.register_transformers()
    model = problem.data.with_attention("pybigmodel").bfloat16()
    optimized = pbm.optimize(model, example_inputs=problem.data.inputs, inplace=True)
    return _torch(problem, optimized, "bf16")


# --- ONNX Runtime -------------------------------------------------------------------------------


def _onnx_file(problem: Encoder) -> AbstractContextManager[Path]:
    """With attention written out, as ONNX Runtime's optimiser recognises it."""
    return onnx_file(problem.data.with_attention("eager"), problem.data.inputs, _NAMES)


def _fused(problem: Encoder, path: Path) -> Path:
    """With its Attention, SkipLayerNormalization and BiasGelu ops."""
    from onnxruntime.transformers import optimizer

    config = problem.data.original.encoder.config
    fused = optimizer.optimize_model(
        str(path),
        model_type="bert",
        num_heads=config.num_attention_heads,
        hidden_size=config.hidden_size,
        opt_level=0,
    )
    target = path.with_name("fused.onnx")
    fused.save_model_to_file(str(target))
    return target


def _onnxruntime(problem: Encoder, path: Path, precision: str) -> Contender:
    from onnxruntime import OrtValue

    from peers.onnxruntime_session import bound, session

    values = {
        name: OrtValue.ortvalue_from_numpy(tensor.numpy())
        for name, tensor in zip(_NAMES, problem.data.inputs, strict=True)
    }
    y = OrtValue.ortvalue_from_numpy(problem.data.eager.numpy().copy())
    call = bound(session(path.read_bytes(), problem.threads), values, {"y": y})

    def result() -> Tensor:
        call()
        return torch.from_numpy(y.numpy())

    return _contender(problem, call, precision, result)


def build_onnxruntime(problem: Encoder) -> Contender:
    with _onnx_file(problem) as path:
        return _onnxruntime(problem, _fused(problem, path), "fp32")


def build_onnxruntime_int8(problem: Encoder) -> Contender:
    """Dynamic, weights per channel."""
    from onnx import TensorProto
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with _onnx_file(problem) as path:
        target = path.with_name("int8.onnx")
        quantize_dynamic(
            _fused(problem, path),
            target,
            weight_type=QuantType.QInt8,
            per_channel=True,
            extra_options={"DefaultTensorType": TensorProto.FLOAT, "MatMulConstBOnly": True},
        )
        return _onnxruntime(problem, target, "int8")


# --- OpenVINO -----------------------------------------------------------------------------------


def _openvino(problem: Encoder, model: Any, precision: str, products: str) -> Contender:
    from peers.openvino_request import compiled

    request = compiled(model, problem.threads, products).create_infer_request()
    for i, tensor in enumerate(problem.data.inputs):
        request.set_input_tensor(i, _openvino_tensor(tensor))

    def result() -> Tensor:
        request.infer()
        return torch.from_numpy(request.get_output_tensor(0).data.copy())

    return _contender(problem, request.infer, precision, result)


def _openvino_tensor(tensor: Tensor) -> Any:
    import openvino

    return openvino.Tensor(tensor.numpy())


def build_openvino(problem: Encoder, precision: str) -> Contender:
    import openvino

    model, inputs = problem.data.with_attention("sdpa"), problem.data.inputs
    shapes = [tuple(tensor.shape) for tensor in inputs]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing
        converted = openvino.convert_model(model, example_input=inputs, input=shapes)
    return _openvino(problem, converted, precision, precision)


def build_openvino_int8(problem: Encoder) -> Contender:
    """Static QDQ, calibrated on this very input (the best case); what is not int8 is bf16."""
    from peers.openvino_request import core

    # ONNX Runtime calibrates, and cannot beside its process-wide pool (see onnxruntime_session).
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as elsewhere:
        without_data = replace(problem)
        model = elsewhere.submit(_statically_quantized, without_data).result()
    return _openvino(problem, core().read_model(model, b""), "int8", "bf16")


def _statically_quantized(problem: Encoder) -> bytes:
    with _onnx_file(problem) as path:
        return statically_quantized(
            path,
            [problem.data.inputs],
            _NAMES,
            op_types_to_quantize=["MatMul"],
            extra_options={"MatMulConstBOnly": True},
        ).read_bytes()


BUILDERS: dict[str, Callable[[Encoder], Contender]] = {
    "torch_eager": build_eager,
    "torch_eager_bf16": build_eager_bf16,
    "onnxruntime_fp32": build_onnxruntime,
    "onnxruntime_int8": build_onnxruntime_int8,
    "openvino_fp32": partial(build_openvino, precision="fp32"),
    "openvino_bf16": partial(build_openvino, precision="bf16"),
    "openvino_int8": build_openvino_int8,
    "pybigmodel_fp32": partial(build_ours, precision="fp32"),
    "pybigmodel_bf16": partial(build_ours, precision="bf16"),
    "pybigmodel_bf16_tensors": build_ours_bf16_tensors,
    "pybigmodel_int8": partial(build_ours, precision="int8"),
}
