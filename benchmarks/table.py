"""Rewrites the figures between the bench markers of README.md and docs/benchmarks.md.

Usage: python benchmarks/table.py [--results FOLDER] [--threads 2]
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cells import cell, mean, medians, table
from conv_table import by_shape as convolutions_by_shape
from conv_table import convolutions, networks
from pool_table import by_shape as poolings_by_shape
from pool_table import poolings
from results import DYNAMIC_PEERS, OURS, Result, from_command_line

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
REPOSITORY = Path(__file__).parent.parent

PEERS = {
    "linear": ("onednn_prepacked", "torch_compile", "onnxruntime", "openvino"),
    "int8_linear": (*DYNAMIC_PEERS, "openvino_static"),
    "int8_weight_only_linear": ("torch_int8pack", "torchao_weight_only", "openvino_weight_only"),
}
LABELS = {
    "linear": "`linear`",
    "int8_linear": "`int8_linear`, dynamic",
    "int8_weight_only_linear": "`int8_weight_only_linear`",
    "linear_forward": "`linear`, weight not packed, forward",
    "linear_forward_backward": "`linear`, weight not packed, forward + backward",
}
_ONNXRUNTIME = ("onnxruntime_attention", "onnxruntime_mha", "onnxruntime_gqa")
# What is not a matrix product: op and providers beside ours, in the order of the tables.
ATTENTION = {
    "attention": ("torch_eager", "torch_flex", *_ONNXRUNTIME, "openvino"),
    "attention_forward_backward": ("torch_eager",),
    "attention_decode": (
        "pybigmodel_int8",
        "torch_eager",
        "torch_grouped",
        "onnxruntime_gqa",
        "openvino_grouped",
        "openvino_stateful",
    ),
    "additive_attention": ("torch_eager", "torch_compile"),
    "additive_attention_forward_backward": ("torch_eager", "torch_compile"),
}
ENCODERS = (
    "torch_eager",
    "torch_eager_bf16",
    "onnxruntime_fp32",
    "onnxruntime_int8",
    "openvino_fp32",
    "openvino_bf16",
    "openvino_int8",
    "pybigmodel_fp32",
    "pybigmodel_bf16",
    "pybigmodel_bf16_tensors",
    "pybigmodel_int8",
)


def _products(results: list[Result]) -> list[str]:
    """One line per op, precision and M: geometric means over the shapes."""
    lines = []
    order = list(LABELS)
    keys = sorted(
        {(r.op, r.precision, r.m) for r in results if r.op in LABELS},
        key=lambda key: (order.index(key[0]), key[1] != "fp32", key[2]),
    )
    for op, precision, m in keys:
        group = [r for r in results if (r.op, r.precision, r.m) == (op, precision, m)]
        streaming = any(r.level for r in group) and m == 1
        limit = "bandwidth_fraction" if streaming else "peak_fraction"
        peers = PEERS.get(op, ())
        lines.append(
            [
                f"{LABELS[op]} {precision}",
                str(m),
                cell(mean(r.number(OURS, "gflops") for r in group), ".0f"),
                cell(mean(r.number(OURS, limit) for r in group), ".0%")
                + (" of the bandwidth" if streaming else ""),
                cell(mean(r.speedup(("torch_eager",)) for r in group), ".2f", "×"),
                cell(mean(r.speedup(peers) for r in group), ".2f", "×"),
            ]
        )
    header = ["work", "M", "GOP/s", "of the peak", "over F.linear", "over the best other peer"]
    return table(header, lines)


def _attention(results: list[Result]) -> list[str]:
    """One line per op, precision and option: geometric means over the shapes."""
    lines = []
    for op, peers in ATTENTION.items():
        of_op = [r for r in results if r.op == op]
        kinds = sorted(
            {(r.precision, _option(r)) for r in of_op},
            key=lambda kind: (kind[0] != "fp32", kind[1]),
        )
        for precision, option in kinds:
            group = [r for r in of_op if (r.precision, _option(r)) == (precision, option)]
            streaming = any(r.level for r in group)
            limit = "bandwidth_fraction" if streaming else "peak_fraction"
            others = [name for name in peers if not name.startswith((OURS, "torch_eager"))]
            lines.append(
                [
                    f"{_label(op)} {precision}{option and ', '}{option}",
                    cell(mean(r.number(OURS, limit) for r in group), ".0%")
                    + (" of the bandwidth" if streaming else ""),
                    cell(mean(r.speedup(("torch_eager",)) for r in group), ".2f", "×"),
                    cell(mean(r.speedup(others) for r in group), ".2f", "×"),
                ]
            )
    if not lines:
        return []
    header = ["work", "of the peak", "over torch", "over the best other peer"]
    return table(header, lines)


def _label(op: str) -> str:
    name = op.removesuffix("_forward_backward")
    return f"`{name}`" if name == op else f"`{name}`, forward + backward"


def _option(r: Result) -> str:
    if (window := r.size("window")) is not None:
        return f"window {window}"
    return "causal" if r.has("causal") else ""


def _minilm(results: list[Result]) -> list[str]:
    names = [
        "torch_eager",
        "torch_compile",
        "pybigmodel_fp32",
        "pybigmodel_bf16",
        "pybigmodel_int8",
    ]
    lines = []
    for r in sorted((r for r in results if r.op == "minilm"), key=lambda r: r.m):
        for name in names:
            seconds = r.seconds(name)
            lines.append(
                [
                    str(r.m),
                    name.replace("_", " "),
                    cell(None if seconds is None else r.m / seconds, ".0f"),
                    cell(r.speedup(("torch_eager",), ours=name), ".2f", "×"),
                    cell(r.number(name, "cosine"), ".6f"),
                ]
            )
    header = ["batch", "all-MiniLM-L6-v2, 128 tokens", "sentences/s", "over eager", "cosine to it"]
    return table(header, lines)


def _by_shape(results: list[Result]) -> list[str]:
    """Every group of the linear family: ours and all peers in microseconds."""
    lines: list[str] = []
    for (op, precision), names in {
        ("linear", "fp32"): [OURS, "torch_eager", *PEERS["linear"]],
        ("linear", "bf16"): [OURS, "torch_eager", *PEERS["linear"]],
        ("int8_linear", "int8"): [OURS, "torch_eager", *PEERS["int8_linear"]],
        ("int8_weight_only_linear", "int8"): [
            OURS,
            "torch_eager",
            *PEERS["int8_weight_only_linear"],
        ],
    }.items():
        group = [r for r in results if r.op == op and r.precision == precision]
        if not group:
            continue
        group.sort(key=lambda r: (r.m, r.k * r.n, r.k, r.level))
        lines += ["", f"### `{op}` {precision}, median µs a call", ""]
        lines += medians(group, names)
    return lines


def _of_attention(results: list[Result]) -> list[str]:
    """Every group of the attention family and of the encoders in microseconds."""
    lines: list[str] = []
    tables = {op: (OURS, *peers) for op, peers in ATTENTION.items()} | {"encoder": ENCODERS}
    for op, names in tables.items():
        for precision in ("fp32", "bf16"):
            group = [r for r in results if (r.op, r.precision) == (op, precision)]
            if not group:
                continue
            group.sort(key=lambda r: ([r.size(name) or 0 for name in "BDS"], r.shape))
            mixed = op == "encoder"
            lines += ["", f"### `{op}`{'' if mixed else f' {precision}'}, median µs a call", ""]
            lines += medians(group, names)
    return lines


def _origin(results: list[Result], threads: int) -> str:
    rows = [row for r in results for row in r.rows.values()]
    versions = {row["provider_version"] for row in rows} - {""}
    peers = ", ".join(sorted(v for v in versions if not v.startswith(OURS)))  # ours: see commit
    commits = ", ".join(sorted({row["commit"] for row in rows}))
    days = sorted({row["date"][:10] for row in rows})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return (
        f"{threads} threads of {rows[0]['cpu']}, {when}, commit {commits}; {peers}. "
        "Geometric means over the shapes; all providers of a row interleaved in one process."
    )


def _rewrite(path: Path, lines: list[str]) -> None:
    text = path.read_text(encoding="utf-8")
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        raise SystemExit(f"{path}: expected one {BEGIN} and one {END}")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    path.write_text(f"{before}{BEGIN}\n" + "\n".join(lines) + f"\n{END}{after}", encoding="utf-8")
    print(path)


def main() -> None:
    results, threads = from_command_line(__doc__)
    origin = _origin(results, threads)
    sections: list[Callable[[list[Result]], list[str]]] = [
        _minilm,
        networks,
        _products,
        _attention,
        convolutions,
        poolings,
    ]
    found = [lines for section in sections if (lines := section(results))]
    summary = [line for lines in found for line in ["", *lines]]
    _rewrite(REPOSITORY / "README.md", [*summary, "", origin, ""])
    by_shape = [
        *_by_shape(results),
        *_of_attention(results),
        *convolutions_by_shape(results),
        *poolings_by_shape(results),
    ]
    _rewrite(REPOSITORY / "docs" / "benchmarks.md", [*by_shape, "", origin, ""])


if __name__ == "__main__":
    main()
