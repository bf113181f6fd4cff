"""The targets of the attention family."""

from __future__ import annotations

from collections.abc import Iterator

from results import ITEMSIZE, Result
from target import Filter, Target, column, ratio, time_over

SDPA, OPENVINO = "torch_eager", "openvino"
PEERS = (SDPA, OPENVINO, "onnxruntime_attention", "onnxruntime_mha", "onnxruntime_gqa")
DECODE_PEERS = (
    SDPA,
    "torch_grouped",
    "onnxruntime_gqa",
    "openvino_grouped",
    "openvino_stateful",
)
FORWARD_BACKWARD = "attention_forward_backward"


def attention_targets() -> Iterator[Target]:
    yield from _fp32()
    yield from _bf16()
    yield from _encoders()
    yield from _backward()
    yield from _decode()
    yield from _window()
    yield from _additive()


def _of(precision: str, causal: bool, s: int | None = None, d: int | None = None) -> Filter:
    """Forward, one sequence, without a window."""

    def where(r: Result) -> bool:
        return (
            (r.op, r.precision, r.size("B")) == ("attention", precision, 1)
            and r.has("causal") == causal
            and r.size("window") is None
            and s in (None, r.size("S"))
            and d in (None, r.size("D"))
        )

    return where


def _fp32() -> Iterator[Target]:
    work, full = "attention fp32, full", _of("fp32", causal=False)
    yield Target(work, "× SDPA", 2.0, full, ratio(SDPA))
    yield Target(work, "× best peer", 1.05, full, ratio(*PEERS))
    longest = _of("fp32", causal=False, s=2048)
    yield Target(f"{work}, S = 2048", "of the FMA peak", 0.75, longest, column("peak_fraction"))
    work, causal = "attention fp32, causal", _of("fp32", causal=True)
    yield Target(work, "× SDPA", 2.5, causal, ratio(SDPA))
    yield Target(work, "× best peer", 1.8, causal, ratio(*PEERS))
    longest = _of("fp32", causal=True, s=2048)
    value = time_over("pybigmodel_full")
    yield Target(f"{work}, S = 2048", "of our full's time", 0.56, longest, value, at_most=True)


def _bf16() -> Iterator[Target]:
    for d, over_openvino, of_peak in ((64, 1.3, 0.72), (128, 1.2, 0.78)):
        work, where = f"attention bf16, full, S = 2048, D = {d}", _of("bf16", False, 2048, d)
        yield Target(work, "× SDPA", 4.0, where, ratio(SDPA))
        yield Target(work, "× OpenVINO", over_openvino, where, ratio(OPENVINO))
        yield Target(work, "of the bf16 peak", of_peak, where, column("peak_fraction"))
    for s, over_sdpa, of_peak in ((2048, 4.5, 0.66), (512, 6.0, 0.55)):
        work, where = f"attention bf16, causal, S = {s}", _of("bf16", True, s)
        yield Target(work, "× SDPA", over_sdpa, where, ratio(SDPA))
        yield Target(work, "× OpenVINO", 2.5, where, ratio(OPENVINO))
        yield Target(work, "of the bf16 peak", of_peak, where, column("peak_fraction"))


def _encoders() -> Iterator[Target]:
    for precision in ("fp32", "bf16"):

        def batches(r: Result, precision: str = precision) -> bool:
            return (r.op, r.precision, r.size("B")) == ("attention", precision, 8)

        work = f"attention {precision}, B 8, H 12, S 128"
        yield Target(work, "× best peer", 1.3, batches, ratio(*PEERS))

    def bert(r: Result) -> bool:
        return r.op == "encoder" and r.has("bert") and r.size("S") == 512

    def over_openvino(r: Result) -> float | None:
        ours = r.best(("pybigmodel_bf16", "pybigmodel_bf16_tensors"))
        return None if ours is None else r.speedup(("openvino_bf16",), ours=ours)

    yield Target("BERT-base bf16, S = 512", "× OpenVINO bf16", 1.0, bert, over_openvino)


def _backward() -> Iterator[Target]:
    for precision, over_sdpa, of_peak in (("fp32", 2.5, 0.50), ("bf16", 3.5, 0.40)):

        def where(r: Result, precision: str = precision) -> bool:
            return (r.op, r.precision) == (FORWARD_BACKWARD, precision) and r.has("causal")

        work = f"attention forward + backward {precision}, causal, S = 1024"
        yield Target(work, "× SDPA", over_sdpa, where, ratio(SDPA))
        peak = f"of the {'FMA' if precision == 'fp32' else precision} peak"
        yield Target(work, peak, of_peak, where, column("peak_fraction"))


def _decode() -> Iterator[Target]:
    for precision, over_peers in (("fp32", 2.5), ("bf16", 20.0)):

        def where(r: Result, precision: str = precision) -> bool:
            return (r.op, r.precision) == ("attention_decode", precision)

        work = f"attention_decode {precision}, Sq = 1"
        bandwidth = column("bandwidth_fraction")
        yield Target(work, "of the level's bandwidth", 0.75, where, bandwidth)
        yield Target(work, "× best peer", over_peers, where, ratio(*DECODE_PEERS))
        yield Target(work, "× SDPA", over_peers, where, ratio(SDPA))
        if precision == "bf16":
            over_bf16 = ratio("pybigmodel", ours="pybigmodel_int8")
            yield Target(f"{work}, int8 cache", "× our bf16", 1.7, where, over_bf16)


def _window() -> Iterator[Target]:
    for precision in ("fp32", "bf16"):

        def where(r: Result, precision: str = precision) -> bool:
            windowed = r.op == "attention" and r.size("window") is not None
            return windowed and r.precision == precision

        work = f"attention {precision}, window 256, S = 4096"
        yield Target(work, "× our causal", 6.0, where, ratio("pybigmodel_causal"))


def _additive() -> Iterator[Target]:
    def tensors(r: Result) -> float | None:
        """Peak memory in tensors of (B, S, H): the composed version's grows with S."""
        peak = r.number("pybigmodel", "peak_bytes")
        sizes = [r.size(name) for name in ("B", "S", "H")]
        if peak is None or None in sizes:
            return None
        b, s, h = sizes
        return peak / (b * s * h * ITEMSIZE[r.precision])

    for op in ("additive_attention", "additive_attention_forward_backward"):

        def where(r: Result, op: str = op) -> bool:
            return r.op == op

        work = f"{op}, H = 256".replace("_forward_backward", " forward + backward")
        yield Target(work, "× composed of torch's ops", 5.0, where, ratio(SDPA))
        yield Target(work, "tensors of (B, S, H) at the peak", 16.0, where, tensors, at_most=True)
