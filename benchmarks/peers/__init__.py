"""Other implementations of the same problems, one file each.

A peer's `build(problem)` returns a `Contender`: one call per copy of what is streamed, ready to be
timed, and a way to read the result. It raises `Unavailable` with the reason where it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

import numpy as np
from problem import Problem
from shapes import Product
from torch import Tensor, from_numpy


class Unavailable(Exception):
    """Why a peer cannot run a problem."""


@dataclass(frozen=True)
class Errors:
    """relative: L2, against float64. largest: over the RMS of the exact result. The rest: see
    Row."""

    relative: float | None = None
    largest: float | None = None
    cosine: float | None = None
    agreement: float | None = None

    @classmethod
    def of(cls, outputs: Sequence[Tensor | np.ndarray], exact: Sequence[Tensor]) -> Errors:
        """Of all outputs together; the largest in units of its own output's RMS."""
        difference = norm = largest = 0.0
        for y, e in zip(outputs, exact, strict=True):
            y = (from_numpy(y) if isinstance(y, np.ndarray) else y).double() - e
            difference += float(y.square().sum())
            norm += float(e.square().sum())
            largest = max(largest, float(y.abs().max() / e.square().mean().sqrt()))
        return cls((difference / norm) ** 0.5, largest)


@dataclass(frozen=True)
class Contender:
    """`calls[i]` computes with the i-th copy of what is streamed; all are ready to be timed."""

    calls: Sequence[Callable[[], Any]]
    errors: Callable[[], Errors]
    note: str = ""  # what a reader of the row must know
    precision: str | None = None  # of its products, where not the problem's
    operations: float | None = None  # of one call, where not the problem's
    streamed_bytes: int | None = None  # from the problem's level, where not the problem's
    prepare: Callable[[], object] | None = None  # before each turn, outside of its time
    records_memory: bool = False  # whether its row says what a call adds to the memory

    @classmethod
    def of_linear(
        cls,
        problem: Product,
        calls: Sequence[Callable[[], Any]],
        result: Callable[[], Any] | None = None,
        note: str = "",
        precision: str | None = None,
    ) -> Contender:
        """For y = x·Wᵀ + b; `result` gives y where the calls themselves do not return it."""

        def errors() -> Errors:
            return Errors.of([(result or calls[0])()], [problem.data.exact])

        return cls(calls, errors, note, precision)


# family of problems: {name: (module in this package, function)}
_PEERS = {
    "linear": {
        "pybigmodel": ("ours", "build"),
        "torch_eager": ("torch_eager", "build"),
        "onednn_prepacked": ("onednn", "build"),
        "torch_compile": ("torch_compile", "build"),
        "onnxruntime": ("onnxruntime_linear", "build"),
        "openvino": ("openvino_linear", "build"),
        "torch_quantize_dynamic": ("torch_quantize_dynamic", "build"),
        "torchao_dynamic": ("torchao_linear", "build_dynamic"),
        "torchao_dynamic_compiled": ("torchao_linear", "build_dynamic_compiled"),
        "onnxruntime_dynamic": ("onnxruntime_linear", "build_dynamic"),
        "openvino_static": ("openvino_linear", "build_static"),
        "torch_int8pack": ("torch_int8pack", "build"),
        "torchao_weight_only": ("torchao_linear", "build_weight_only"),
        "openvino_weight_only": ("openvino_linear", "build_weight_only"),
    },
    "attention": {
        "pybigmodel": ("ours_attention", "build"),
        "pybigmodel_full": ("ours_attention", "build_full"),
        "pybigmodel_causal": ("ours_attention", "build_causal"),
        "torch_eager": ("torch_attention", "build"),
        "torch_flex": ("torch_attention", "build_flex"),
        "onnxruntime_attention": ("onnxruntime_attention", "build"),
        "onnxruntime_mha": ("onnxruntime_attention", "build_mha"),
        "onnxruntime_gqa": ("onnxruntime_attention", "build_gqa"),
        "openvino": ("openvino_attention", "build"),
    },
    "attention_decode": {
        "pybigmodel": ("ours_attention", "build_decode"),
        "pybigmodel_int8": ("ours_attention", "build_decode_int8"),
        "torch_eager": ("torch_attention", "build_decode"),
        "torch_grouped": ("torch_attention", "build_decode_grouped"),
        "onnxruntime_gqa": ("onnxruntime_attention", "build_decode"),
        "openvino_grouped": ("openvino_attention", "build_decode"),
        "openvino_stateful": ("openvino_decode", "build"),
    },
    "additive_attention": {
        "pybigmodel": ("ours_attention", "build_additive"),
        "torch_eager": ("torch_attention", "build_additive"),
        "torch_compile": ("torch_attention", "build_additive_compiled"),
    },
    "conv": {
        "pybigmodel": ("ours_conv", "build"),
        "pybigmodel_exact": ("ours_conv", "build_exact"),
        "pybigmodel_bytes": ("ours_conv", "build_bytes"),
        "pybigmodel_contiguous": ("ours_conv", "build_contiguous"),
        "torch_eager": ("torch_conv", "build"),
        "torch_channels_last": ("torch_conv", "build_channels_last"),
        "onednn_prepacked": ("torch_conv", "build_onednn"),
        "torch_compile": ("torch_conv", "build_compiled"),
        "onnxruntime": ("onnxruntime_conv", "build"),
        "onnxruntime_static": ("onnxruntime_conv", "build_static"),
        "openvino": ("openvino_conv", "build"),
        "openvino_static": ("openvino_conv", "build_static"),
    },
    "conv_transpose": {
        "pybigmodel": ("ours_conv", "build_transposed"),
        "torch_eager": ("torch_conv", "build"),
        "torch_channels_last": ("torch_conv", "build_channels_last"),
        "torch_compile": ("torch_conv", "build_compiled"),
        "onnxruntime": ("onnxruntime_conv", "build_transposed"),
        "openvino": ("openvino_conv", "build"),
    },
    "pool": {
        "pybigmodel": ("ours_pool", "build"),
        "torch_eager": ("torch_pool", "build"),
        "torch_channels_last": ("torch_pool", "build_channels_last"),
        "torch_compile": ("torch_pool", "build_compiled"),
        "onnxruntime": ("onnxruntime_pool", "build"),
        "openvino": ("openvino_pool", "build"),
    },
}


def build(name: str, problem: Problem) -> Contender:
    """The peer's contender for `problem`; a package that is not installed makes it Unavailable."""
    module, function = _PEERS[problem.family][name]
    try:
        builder = getattr(import_module(f"peers.{module}"), function)
    except ModuleNotFoundError as missing:
        raise Unavailable(f"{missing.name} is not installed") from missing
    contender: Contender = builder(problem)
    return contender


def version(name: str) -> str:
    """Distribution and version of the provider, whose name begins with the distribution's."""
    distribution = name.split("_")[0].replace("onednn", "torch")  # torch's copy of oneDNN
    try:
        return f"{distribution} {metadata.version(distribution)}"
    except metadata.PackageNotFoundError:  # our source tree on the path; the row has its commit
        return f"{distribution} {import_module(distribution).__version__}"
