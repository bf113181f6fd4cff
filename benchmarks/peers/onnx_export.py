"""Whole models in ONNX: exported by torch, and quantised by ONNX Runtime."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@contextmanager
def onnx_file(model: nn.Module, inputs: Sequence[Tensor], names: Sequence[str]) -> Iterator[Path]:
    """Its output is called y; the file's folder goes away with it."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter about itself, and of tracing
        path = Path(folder) / "model.onnx"
        torch.onnx.export(
            model,
            tuple(inputs),
            path,
            dynamo=False,
            input_names=list(names),
            output_names=["y"],
            opset_version=17,
        )
        yield path


def statically_quantized(
    path: Path, examples: Sequence[Sequence[Tensor]], names: Sequence[str], **options: Any
) -> Path:
    """QDQ, activations uint8 with the range that they have on the examples, weights per channel.

    In a process that has no session with ONNX Runtime's process-wide pool: calibration refuses it.
    """
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    target = path.with_name("int8.onnx")
    quantize_static(
        path,
        target,
        _Calibration(examples, names),
        quant_format=QuantFormat.QDQ,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        **options,
    )
    return target


class _Calibration:
    """What quantize_static reads its examples from."""

    def __init__(self, examples: Sequence[Sequence[Tensor]], names: Sequence[str]) -> None:
        self._examples = iter(
            [dict(zip(names, (t.numpy() for t in one), strict=True)) for one in examples]
        )

    def get_next(self) -> dict[str, Any] | None:
        return next(self._examples, None)
