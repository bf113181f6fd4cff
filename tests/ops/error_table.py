"""Measures the errors that docs/numerics.md shows: `python tests/ops/error_table.py --write`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from pybigmodel import ops
from pybigmodel.testing import Error, available_isas, force_isa, measure_error

DOC = Path(__file__).resolve().parents[2] / "docs" / "numerics.md"
BEGIN, END = "<!-- measured errors: begin -->", "<!-- measured errors: end -->"
SHAPES = [(64, 768, 768), (64, 768, 3072), (16, 256, 16384)]  # rows, out_features, in_features


def products(m: int, n: int, k: int) -> Iterator[tuple[str, Callable[[], Tensor], Tensor, Tensor]]:
    """(what, ours, torch's result in the same dtype, exact)."""
    torch.manual_seed(0)
    x, w = torch.randn(m, k), torch.randn(n, k) / k**0.5
    exact = F.linear(x.double(), w.double())
    yield "linear fp32", lambda: ops.linear(x, w), F.linear(x, w), exact
    for dtype, name in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        a, b = x.to(dtype), w.to(dtype)
        e = F.linear(a.double(), b.double())
        yield f"linear {name}", lambda a=a, b=b: ops.linear(a, b), F.linear(a, b), e  # type: ignore[misc]
    half = F.linear(x.bfloat16(), w.bfloat16()).float()
    yield 'linear fp32, precision="bf16"', lambda: ops.linear(x, w, precision="bf16"), half, exact
    q, scale = ops.quantize_weight(w)
    packed, back = ops.pack_int8_linear_weight(q), q * scale[:, None]
    e = F.linear(x.double(), q.double() * scale.double()[:, None])
    yield (
        "weight-only int8 fp32",
        lambda: ops.int8_weight_only_linear(x, packed, scale),
        F.linear(x, back),
        e,
    )
    for size in (1e2, 1e4):
        far = x.clone()
        far[torch.arange(m), torch.randint(k, (m,))] *= size
        e_far = F.linear(far.double(), q.double() * scale.double()[:, None])
        yield (
            f"the same, one outlier of {size:.0f} a row",
            lambda far=far: ops.int8_weight_only_linear(far, packed, scale),  # type: ignore[misc]
            F.linear(far, back),
            e_far,
        )


def int8_errors(m: int, n: int, k: int) -> Iterator[tuple[str, Error]]:
    torch.manual_seed(0)
    x, w = torch.randn(m, k), torch.randn(n, k) / k**0.5
    exact = F.linear(x.double(), w.double())
    q, scale = ops.quantize_weight(w)
    packed = ops.pack_int8_linear_weight(q)
    yield "weight-only int8", measure_error(ops.int8_weight_only_linear(x, packed, scale), exact)
    yield "int8, asymmetric", measure_error(ops.int8_linear(x, packed, scale), exact)
    yield "int8, symmetric", measure_error(ops.int8_linear(x, packed, scale, symmetric=True), exact)


def table() -> str:
    isas = available_isas()
    lines = [
        "Relative Frobenius error against float64; in brackets its ratio to torch's.",
        "",
        "| product (M, N, K) | torch | " + " | ".join(isas) + " |",
        "|---|---|" + "---|" * len(isas),
    ]
    for shape in SHAPES:
        for what, ours, theirs, exact in products(*shape):
            other = measure_error(theirs, exact).frobenius
            cells = []
            for isa in isas:
                with force_isa(isa):
                    mine = measure_error(ours(), exact).frobenius
                cells.append(f"{mine:.2g} ({mine / other:.2f})")
            lines.append(f"| {what} {shape} | {other:.2g} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "What int8 itself costs, against the unquantised product in float64 (best tier):",
        "",
    ]
    lines += ["| product (M, N, K) | relative Frobenius | scaled maximum |", "|---|---|---|"]
    for shape in SHAPES:
        for what, error in int8_errors(*shape):
            lines.append(f"| {what} {shape} | {error.frobenius:.2g} | {error.maximum:.2g} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/numerics.md")
    text = table()
    if parser.parse_args().write:
        before, rest = DOC.read_text().split(BEGIN)
        DOC.write_text(f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}")
    else:
        print(text)
