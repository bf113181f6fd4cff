"""The targets of the convolution family."""

from __future__ import annotations

from collections.abc import Iterator

from conv_results import (
    DEPTHWISE,
    FIRST,
    FORWARD,
    FORWARD_BACKWARD,
    FROZEN,
    INT8,
    INT8_PEERS,
    PEERS,
    POINTWISE,
    SQUARE,
    STRIDED,
    TORCH,
    VISION_PEERS,
    kind,
)
from results import OURS, Result
from target import Filter, Target, column, ratio, time_over


def conv_targets() -> Iterator[Target]:
    yield from _layers()
    yield from _int8()
    yield from _training()
    yield from _models()


def _of(precision: str, *kinds: str) -> Filter:
    return lambda r: (r.op, r.precision) == (FORWARD, precision) and kind(r) in kinds


def _layers() -> Iterator[Target]:
    best = ratio(*PEERS)
    square = _of("fp32", SQUARE)

    def small(r: Result) -> bool:
        return square(r) and r.size("C") != 512

    def large(r: Result) -> bool:
        """Its weights, transformed for F(4×4, 3×3), leave the cache."""
        return square(r) and r.size("C") == 512

    yield Target("conv2d fp32, 3×3, C < 512", "× best peer", 2.3, small, best, by_mean=True)
    yield Target("conv2d fp32, 3×3, C = 512", "× best peer", 1.05, large, best)
    for k in (POINTWISE, FIRST, STRIDED):
        yield Target(f"conv2d fp32, {k}", "× best peer", 0.97, _of("fp32", k), best)
    where = _of("fp32", DEPTHWISE)
    yield Target("conv2d fp32, depthwise", "× best peer", 1.8, where, best, by_mean=True)
    for k in (SQUARE, POINTWISE):
        prepacked = ratio("onednn_prepacked")
        yield Target(f"conv2d bf16, {k}", "× oneDNN prepacked", 0.97, _of("bf16", k), prepacked)


def _int8() -> Iterator[Target]:
    def where(r: Result) -> bool:
        return r.op == INT8

    def many_channels(r: Result) -> bool:
        return where(r) and (r.size("C") or 0) >= 128

    yield Target(INT8, "× ONNX Runtime static", 1.15, where, ratio(INT8_PEERS[0]))
    peak = column("peak_fraction")
    yield Target(f"{INT8}, C ≥ 128", "of the VNNI peak", 0.75, many_channels, peak)


def _training() -> Iterator[Target]:
    for work, batch, aim in (("LeNet's layers", 64, 1.3), ("3×3, C = 64", 8, 1.7)):

        def where(r: Result, batch: int = batch) -> bool:
            return (r.op, r.size("B")) == (FORWARD_BACKWARD, batch)

        work = f"conv2d forward + backward fp32, {work}, B = {batch}"
        yield Target(work, "× torch, the better layout", aim, where, ratio(*TORCH))


def _models() -> Iterator[Target]:
    def of(model: str) -> Filter:
        return lambda r: r.op == "vision" and r.has(model)

    resnet = of("resnet50")
    for precision, aim in (("fp32", 0.75), ("bf16", 1.0), ("int8", 1.05)):
        for ours, words in ((FROZEN, ", frozen"), (OURS, "")):
            value = time_over(*VISION_PEERS[precision], ours=f"{ours}_{precision}")
            work = f"ResNet-50 {precision}{words}"
            yield Target(work, "of the best peer's time", aim, resnet, value, at_most=True)
    compiled = "pybigmodel_compile"
    value = time_over(*VISION_PEERS["fp32"], ours=compiled)
    work = "ResNet-50 fp32, our backend"
    yield Target(work, "of the best peer's time", 0.75, resnet, value, at_most=True)
    agreement = column("agreement", f"{FROZEN}_fp32")
    work = "top-1 as eager's"
    yield Target("ResNet-50 fp32", work, 0.995, resnet, agreement, digits=3)
    where = of("mobilenetv2")
    kinds = (f"{FROZEN}_fp32", ", frozen"), (f"{OURS}_fp32", ""), (compiled, ", our backend")
    for ours, words in kinds:
        value = time_over("openvino_fp32", ours=ours)
        work = f"MobileNetV2 fp32{words}"
        yield Target(work, "of OpenVINO's time", 1.2, where, value, at_most=True)
