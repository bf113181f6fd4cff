"""Other implementations of the same products, one file each.

A peer's `build(problem)` returns a `Contender`: one call per copy of the weight, ready to be timed,
and a way to read the result. It raises `Unavailable` with the reason where it has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from typing import Any

from shapes import Problem


class Unavailable(Exception):
    """Why a peer cannot run a problem."""


@dataclass(frozen=True)
class Errors:
    """relative: L2, against float64. largest: over the RMS of the exact result. cosine: see Row."""

    relative: float | None = None
    largest: float | None = None
    cosine: float | None = None


@dataclass(frozen=True)
class Contender:
    """`calls[i]` computes with the i-th copy of the weight; all are ready to be timed."""

    calls: Sequence[Callable[[], Any]]
    errors: Callable[[], Errors]
    note: str = ""  # what a reader of the row must know
    precision: str | None = None  # of its products, where not the problem's
    operations: float | None = None  # of one call, where not the problem's

    @classmethod
    def of_linear(
        cls,
        problem: Problem,
        calls: Sequence[Callable[[], Any]],
        result: Callable[[], Any] | None = None,
        note: str = "",
        precision: str | None = None,
    ) -> Contender:
        """For y = x·Wᵀ + b; `result` gives y where the calls themselves do not return it."""

        def errors() -> Errors:
            return Errors(*problem.data.errors((result or calls[0])()))

        return cls(calls, errors, note, precision)


# name: (module in this package, function)
_PEERS = {
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
}


def build(name: str, problem: Problem) -> Contender:
    """The peer's contender for `problem`; a package that is not installed makes it Unavailable."""
    module, function = _PEERS[name]
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
