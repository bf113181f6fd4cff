"""Prints the project's speed targets beside what the CSV files say.

Usage: python benchmarks/targets.py [--results FOLDER] [--threads 2]
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attention_targets import attention_targets
from conv_targets import conv_targets
from results import (
    DYNAMIC_PEERS,
    OURS,
    PER_TENSOR_PEERS,
    Result,
    from_command_line,
    geometric_mean,
)
from target import Filter, Target, column, ratio

from pybigmodel._console import OtherLoad

PREPACKED = ("onednn_prepacked", "onnxruntime", "openvino")


def _of(op: str, precision: str | None = None, m: Callable[[int], bool] = lambda m: True) -> Filter:
    return lambda r: r.op == op and m(r.m) and precision in (None, r.precision)


def _large(m: int) -> bool:
    return m >= 128


def _is(value: int) -> Callable[[int], bool]:
    return lambda m: m == value


def _error_ratio(r: Result) -> float | None:
    own = r.number(OURS, "rel_error")
    theirs = [e for p in PER_TENSOR_PEERS if (e := r.number(p, "rel_error")) is not None]
    return min(theirs) / own if own and theirs else None


def _linear() -> Iterator[Target]:
    for_large = _of("linear", "fp32", _large)
    work = "linear fp32, M ≥ 128"
    yield Target(work, "× F.linear (AMD)", 2.2, for_large, ratio("torch_eager"))
    yield Target(work, "× oneDNN prepacked", 0.97, for_large, ratio("onednn_prepacked"))
    yield Target(work, "of the FMA peak", 0.86, for_large, column("peak_fraction"))
    for op, aim in (("linear_forward", 2.0), ("linear_forward_backward", 1.8)):
        work = f"not prepacked, {op.removeprefix('linear_').replace('_', ' + ')}, fp32"
        yield Target(work, "× F.linear", aim, _of(op, "fp32"), ratio("torch_eager"))
    yield Target(
        "linear fp32, M = 8", "× best peer", 1.2, _of("linear", "fp32", _is(8)), ratio(*PREPACKED)
    )
    yield Target(
        "linear fp32, M = 1",
        "of the level's bandwidth",
        0.85,
        _of("linear", "fp32", _is(1)),
        column("bandwidth_fraction"),
    )
    for text, m, aim in (("≥ 128", _large, 0.98), ("= 8", _is(8), 1.2), ("= 1", _is(1), 1.4)):
        where = _of("linear", "bf16", m)
        yield Target(f"linear bf16, M {text}", "× best peer", aim, where, ratio(*PREPACKED))


def _int8() -> Iterator[Target]:
    large = _of("int8_linear", m=_large)
    work = "int8_linear, M ≥ 128"
    yield Target(work, "× best dynamic peer", 1.05, large, ratio(*DYNAMIC_PEERS), by_mean=True)
    yield Target(work, "× OpenVINO static", 0.97, large, ratio("openvino_static"), by_mean=True)
    yield Target(
        "int8_linear, M = 1024",
        "of the VNNI peak",
        0.78,
        _of("int8_linear", m=_is(1024)),
        column("peak_fraction"),
        by_mean=True,
    )
    yield Target(work, "× smaller error than per-tensor peers", 1.0, large, _error_ratio)
    every = (*DYNAMIC_PEERS, "openvino_static")
    for m, aim in ((8, 1.4), (1, 1.2)):
        where = _of("int8_linear", m=_is(m))
        yield Target(f"int8_linear, M = {m}", "× best peer", aim, where, ratio(*every))
    where = _of("int8_weight_only_linear", m=_is(1))
    work = "int8_weight_only_linear, M = 1"
    yield Target(work, "of the level's bandwidth", 0.85, where, column("bandwidth_fraction"))
    yield Target(work, "× F.linear fp32", 3.0, where, ratio("torch_eager"))


def _rest() -> Iterator[Target]:
    for batch, aim in ((1, 2.5), (32, 3.0)):
        where = _of("minilm", m=_is(batch))
        value = ratio("torch_eager", ours="pybigmodel_int8")
        yield Target(f"MiniLM int8, batch {batch}", "× eager fp32", aim, where, value)
    where = _of("minilm")
    for precision, aim, digits in (("int8", 0.995, 5), ("fp32", 1 - 1e-6, 9)):
        value = column("cosine", f"pybigmodel_{precision}")
        yield Target(f"MiniLM {precision}", "cosine to eager", aim, where, value, digits=digits)

    def avx2(r: Result) -> bool:
        return r.op == "tiers" and r.isa == "avx2"

    yield Target(
        "avx2 tier, linear fp32, M ≥ 128",
        "of the AVX2 FMA peak",
        0.8,
        avx2,
        column("peak_fraction", "pybigmodel_fp32"),
    )
    yield Target(
        "avx2 tier, int8_linear, M ≥ 128",
        "× its fp32",
        1.5,
        avx2,
        ratio("pybigmodel_fp32", ours="pybigmodel_int8"),
    )
    yield Target(
        "a call of a packed 64×64 linear, M = 1",
        "µs",
        3.5,
        _of("linear_call"),
        column("median_us"),
        at_most=True,
    )


def _line(target: Target, results: list[Result]) -> str:
    picked = [r for r in results if target.where(r)]
    values = {r.shape: v for r in picked if (v := target.value(r)) is not None}
    aim = f"{'≤' if target.at_most else '≥'} {target.aim:.{max(target.digits, 2)}f} {target.text}"
    if not values:
        return f"| {target.work} | {aim} | - | - | - | not measured |"
    mean = geometric_mean(values.values())
    pick = max if target.at_most else min
    worst = pick(values, key=values.__getitem__)
    holding = sum(map(target.holds, values.values()))
    if target.by_mean:
        verdict = "met" if target.holds(mean) else "MISSED"
    else:
        verdict = "met" if holding == len(values) else f"MISSED ({holding} of {len(values)})"
    d = target.digits
    return f"| {target.work} | {aim} | {mean:.{d}f} | {values[worst]:.{d}f} | {worst} | {verdict} |"


def main() -> None:
    results, _ = from_command_line(__doc__)
    print("| work | target | geometric mean | worst | where | verdict |")
    print("|---|---|---|---|---|---|")
    for target in [*_linear(), *_int8(), *_rest(), *attention_targets(), *conv_targets()]:
        print(_line(target, results))
    rows = [row for r in results for row in r.rows.values()]
    enough = OtherLoad.ENOUGH_TO_MATTER
    busy = {row["group"] for row in rows if float(row["other_load"]) > enough}
    print(f"\n{len(rows)} rows in {len(results)} groups; commits: ", end="")
    print(", ".join(sorted({row["commit"] for row in rows})))
    if busy:
        print(f"{len(busy)} groups were measured while other processes used over {enough} cores.")


if __name__ == "__main__":
    main()
