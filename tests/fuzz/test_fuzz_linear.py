"""Random calls of the linear ops: every tier against float64, and against the others.

Shapes, layouts, dtypes and epilogues that nobody thought of. The tolerance is the worst case of the
algorithm (terms · epsilon · Σ|x·w|), so that a failure is a wrong index and never bad luck.
"""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import tensors
from torch import Tensor

from pybigmodel import ops
from pybigmodel.reference.linear import ACTIVATION_FUNCTIONS, quantize_per_token
from pybigmodel.testing import assert_exact, available_isas, force_isa

DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
SIZES = st.one_of(
    st.integers(0, 9), st.integers(10, 70), st.sampled_from([127, 255, 256, 257, 300])
)
ROWS = st.lists(st.integers(0, 9), min_size=0, max_size=3)


@st.composite
def calls(draw: st.DrawFn) -> dict[str, object]:
    lead, n, k, dtype = draw(ROWS), draw(SIZES), draw(SIZES), draw(DTYPES)
    bias_dtype = draw(st.sampled_from([None, dtype, torch.float32]))
    return {
        "x": draw(tensors([*lead, k], dtype)),
        "w": draw(tensors([n, k], dtype)),
        "bias": None if bias_dtype is None else draw(tensors([n], bias_dtype)),
        "residual": draw(tensors([*lead, n], dtype)) if draw(st.booleans()) else None,
        "activation": draw(st.sampled_from(list(ACTIVATION_FUNCTIONS))),
    }


def expected(
    call: dict[str, object], x: Tensor, w: Tensor, carried: Tensor
) -> tuple[Tensor, Tensor]:
    """The result in float64, and how far from it a kernel may be; x, w in float64."""
    sums, sizes = x @ w.t(), x.abs() @ w.abs().t()
    bound = sizes * (x.shape[-1] + 8) * 2.0**-23 + carried
    if isinstance(call["bias"], Tensor):
        sums = sums + call["bias"].double()
        bound = bound + sums.abs() * 2.0**-24
    y = ACTIVATION_FUNCTIONS[str(call["activation"])](sums)
    bound = 1.13 * bound + 1e-6 * sums.abs()
    if isinstance(call["residual"], Tensor):
        y = y + call["residual"].double()
    dtype = call["x"].dtype  # type: ignore[attr-defined]
    bound = bound + y.abs() * 2.0**-23
    # Also linear() under no fusion: product, activation and residual each rounded to the dtype.
    rounding = torch.finfo(dtype).eps * (y.abs() + 2.3 * sums.abs() + bound)
    return y, bound + rounding + torch.finfo(dtype).smallest_normal


def check(call: dict[str, object], results: dict[str, Tensor], y: Tensor, bound: Tensor) -> None:
    x: Tensor = call["x"]  # type: ignore[assignment]
    for name, result in results.items():
        assert result.shape == y.shape and result.dtype == x.dtype and result.is_contiguous(), name
        assert ((result.double() - y).abs() <= bound).all(), name


@given(calls(), st.sampled_from(["fp32", "bf16"]))
def test_linear(call: dict[str, object], precision: str) -> None:
    x, w = call["x"], call["w"]
    assert isinstance(x, Tensor) and isinstance(w, Tensor)
    results = {}
    for isa in available_isas():
        with force_isa(isa):
            results[f"linear.{isa}"] = ops.linear(**_named(call), precision=precision)
            packed = ops.pack_linear_weight(w, precision)
            more = {k: call[k] for k in ("bias", "activation", "residual")}
            results[f"packed.{isa}"] = ops.linear_packed(x, packed, w.shape[0], **more)
    rounded = (x.bfloat16(), w.bfloat16()) if precision == "bf16" else (x, w)
    y, bound = expected(call, rounded[0].double(), rounded[1].double(), torch.zeros(()))
    check(call, results, y, bound)


@given(calls(), st.booleans())
def test_int8(call: dict[str, object], symmetric: bool) -> None:
    x, w = call["x"], call["w"]
    assert isinstance(x, Tensor) and isinstance(w, Tensor)
    q, scale = ops.quantize_weight(w)
    packed = ops.pack_int8_linear_weight(q)
    more = {k: call[k] for k in ("bias", "activation", "residual")}
    dynamic, weight_only = {}, {}
    for isa in available_isas():
        with force_isa(isa):
            dynamic[isa] = ops.int8_linear(x, packed, scale, symmetric=symmetric, **more)
            weight_only[isa] = ops.int8_weight_only_linear(x, packed, scale, **more)
    w64 = q.double() * scale.double()[:, None]
    xq, xs, xz = quantize_per_token(x, symmetric)
    x64 = (xq.double() - xz.double()[..., None]) * xs.double()[..., None]
    check(call, dynamic, *expected(call, x64, w64, torch.zeros(())))
    if call["activation"] in ("none", "relu"):  # no fused arithmetic: the same on every tier
        for result in dynamic.values():
            assert_exact(result, dynamic["scalar"])
    largest = x.double().abs().amax(-1, keepdim=True) if x.shape[-1] else x.new_zeros(())
    carried = largest * 2.0**-23 * w64.abs().sum(1)
    check(call, weight_only, *expected(call, x.double(), w64, carried))


@given(calls())
def test_backward(call: dict[str, object]) -> None:
    x, w = call["x"], call["w"]
    assert isinstance(x, Tensor) and isinstance(w, Tensor)
    dy = call["residual"] if call["residual"] is not None else torch.ones(*x.shape[:-1], w.shape[0])
    dy = dy.to(x.dtype)  # type: ignore[attr-defined]
    rows = dy.double().reshape(x.shape[:-1].numel(), w.shape[0])
    inputs = x.double().reshape(rows.shape[0], w.shape[1])
    exact = [
        (rows @ w.double(), rows.abs() @ w.double().abs(), w.shape[0]),
        (rows.t() @ inputs, rows.abs().t() @ inputs.abs(), rows.shape[0]),
        (rows.sum(0), rows.abs().sum(0), rows.shape[0]),
    ]
    finfo = torch.finfo(x.dtype)
    for isa in available_isas():
        with force_isa(isa):
            got = torch.ops.pybigmodel.linear_backward(dy, x, w, 0, True, True, True)
        for actual, (y, sizes, terms) in zip(got, exact, strict=True):
            bound = sizes * (terms + 8) * 2.0**-23 + finfo.eps * y.abs() + finfo.smallest_normal
            assert ((actual.double().reshape(y.shape) - y).abs() <= bound).all(), isa


def _named(call: dict[str, object]) -> dict[str, object]:
    return {
        "input": call["x"],
        "weight": call["w"],
        **{k: call[k] for k in ("bias", "activation", "residual")},
    }
