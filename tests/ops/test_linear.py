"""linear and linear_packed: values, layouts, epilogues, tiers, threads."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from linear_cases import ACTIVATIONS, FLOATS, SHAPES, Case, layouts, linear64, make_case
from torch import Tensor

from pybigmodel import _native, ops
from pybigmodel.reference import linear as reference
from pybigmodel.testing import (
    assert_exact,
    assert_no_worse,
    available_isas,
    force_isa,
    measure_error,
)

PRECISIONS = ["fp32", "bf16"]


def check_product(case: Case, precision: str, actual: Tensor) -> None:
    """The policy; where bf16 is asked of wider tensors, also that the accumulators are fp32."""
    dtype = case.weight.dtype
    if precision == "fp32" or dtype == torch.bfloat16:
        theirs = case.each(lambda x: F.linear(x, case.weight))
        assert_no_worse(actual, theirs, case.each(lambda x: linear64(x, case.weight)))
        return
    rounded = case.weight.bfloat16()
    in_bf16 = case.each(lambda x: F.linear(x.bfloat16(), rounded)).to(dtype)
    assert_no_worse(actual, in_bf16, case.each(lambda x: linear64(x, case.weight)))
    exact_sums = case.each(lambda x: linear64(x.bfloat16(), rounded))
    assert measure_error(actual, exact_sums).frobenius <= max(1e-6, torch.finfo(dtype).eps / 2)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_linear(isa: str, precision: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    case = make_case(shape, dtype)
    actual = case.each(lambda x: ops.linear(x, case.weight, precision=precision))
    flavour = "bf16" if precision == "bf16" or dtype == torch.bfloat16 else "f32"
    assert _native.last_kernel() == f"gemm_{flavour}.{isa}"
    check_product(case, precision, actual)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("packed", PRECISIONS)
def test_linear_packed(
    isa: str, packed: str, dtype: torch.dtype, shape: tuple[int, int, int]
) -> None:
    case = make_case(shape, dtype)
    panels = ops.pack_linear_weight(case.weight, packed)
    packed = "bf16" if dtype == torch.bfloat16 else packed
    actual = case.each(lambda x: ops.linear_packed(x, panels, shape[1]))
    assert _native.last_kernel() == f"gemm_{'bf16' if packed == 'bf16' else 'f32'}.{isa}"
    check_product(case, packed, actual)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (15, 3), (17, 5), (48, 64), (33, 257)], ids=str)
def test_packed_layout(
    isa: str, precision: str, dtype: torch.dtype, shape: tuple[int, int]
) -> None:
    """Panels of 16 columns, groups of 64 bytes, zeros behind the edges: element by element."""
    weight = torch.randn(shape).to(dtype)
    n, k = shape
    bf16 = precision == "bf16" or dtype == torch.bfloat16
    packed = torch.bfloat16 if bf16 else torch.float32
    lanes = 4 // packed.itemsize
    padded = torch.zeros(-(-n // 16) * 16, -(-k // lanes) * lanes)
    padded[:n, :k] = weight.to(packed).float()
    expected = padded.view(-1, 16, padded.shape[1] // lanes, lanes).transpose(1, 2).flatten(2)
    expected = expected.to(packed)
    for _, w in layouts(weight):
        assert_exact(ops.pack_linear_weight(w, precision), expected)


@pytest.mark.parametrize(
    "lead", [(), (4,), (2, 3), (2, 1, 3), (1, 2, 3, 2), (2, 2, 1, 2, 2)], ids=str
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_leading_dimensions(isa: str, dtype: torch.dtype, lead: tuple[int, ...]) -> None:
    x, w, b = torch.randn(*lead, 20).to(dtype), torch.randn(18, 20).to(dtype), torch.randn(18)
    expected = ops.linear(x.reshape(-1, 20), w, b).view(*lead, 18)
    assert_exact(ops.linear(x, w, b), expected)
    panels = ops.pack_linear_weight(w, "bf16" if dtype == torch.bfloat16 else "fp32")
    assert_exact(ops.linear_packed(x, panels, 18, b), expected)
    residual = torch.randn(*lead, 18).to(dtype)
    y = ops.linear_packed(x, panels, 18, b, residual=residual)
    assert y.shape == (*lead, 18)


@pytest.mark.parametrize(
    ("m", "n", "k"), [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0), (0, 5, 0), (3, 0, 0)]
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_empty(isa: str, precision: str, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    x, w, b = torch.randn(2, m, k).to(dtype), torch.randn(n, k).to(dtype), torch.randn(n).to(dtype)
    panels = ops.pack_linear_weight(w, precision)
    assert panels.shape[0] == -(-n // 16)
    residual = torch.randn(2, m, n).to(dtype)
    for bias in (None, b):
        expected = F.linear(x, w, bias)
        assert_exact(ops.linear(x, w, bias, precision=precision), expected)
        assert_exact(ops.linear_packed(x, panels, n, bias), expected)
        y = ops.linear_packed(x, panels, n, bias, activation="relu", residual=residual)
        assert_exact(y, expected.relu() + residual)


@pytest.mark.parametrize("shape", [(5, 18, 21), (7, 1, 1), (1, 33, 64)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(isa: str, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
    """The layout of no argument changes one bit of the result."""
    m, n, k = shape
    x, w, residual = torch.randn(2, m, k), torch.randn(n, k), torch.randn(2, m, n)
    x, w, residual = x.to(dtype), w.to(dtype), residual.to(dtype)
    bias = torch.randn(n).to(dtype)
    panels = ops.pack_linear_weight(w)
    plain = ops.linear(x, w, bias)
    packed = ops.linear_packed(x, panels, n, bias, residual=residual)
    for (kind, xs), (_, ws), (_, rs) in zip(layouts(x), layouts(w), layouts(residual), strict=True):
        strided_bias = bias.repeat_interleave(2)[::2]
        assert torch.equal(xs, x) and torch.equal(ws, w) and torch.equal(rs, residual)
        assert_exact(ops.linear(xs, w, strided_bias), plain), kind
        assert_exact(ops.linear(x, ws, bias), plain), kind
        assert_exact(ops.linear_packed(xs, panels, n, strided_bias, residual=rs), packed), kind


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_expanded(isa: str, dtype: torch.dtype) -> None:
    """Stride 0 in any dimension of any argument."""
    x, w = torch.randn(1, 1, 20).to(dtype), torch.randn(1, 20).to(dtype)
    one, bias = torch.randn(1, 1).to(dtype), torch.randn(1).to(dtype)
    for xs in (x.expand(3, 5, 20), one.view(1, 1, 1).expand(3, 5, 20)):
        expected = ops.linear(xs.contiguous(), w.expand(18, 20).contiguous(), bias.repeat(18))
        assert_exact(ops.linear(xs, w.expand(18, 20), bias.expand(18)), expected)
        panels = ops.pack_linear_weight(w.expand(18, 20))
        residual = one.view(1, 1, 1).expand(3, 5, 18)
        y = ops.linear_packed(xs, panels, 18, bias.expand(18), residual=residual)
        again = ops.linear_packed(
            xs.contiguous(), panels, 18, bias.repeat(18), residual=residual.contiguous()
        )
        assert_exact(y, again)


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("bias_dtype", [None, "input", torch.float32], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_epilogue(
    isa: str, dtype: torch.dtype, activation: str, bias_dtype: object, with_residual: bool
) -> None:
    x, w = torch.randn(19, 65).to(dtype), (torch.randn(50, 65) / 8).to(dtype)
    bias = None if bias_dtype is None else torch.randn(50)
    if bias is not None and bias_dtype == "input":
        bias = bias.to(dtype)
    residual = torch.randn(19, 50).to(dtype) if with_residual else None
    packed = "bf16" if dtype == torch.bfloat16 else "fp32"
    fused = ops.linear_packed(
        x, ops.pack_linear_weight(w, packed), 50, bias, activation=activation, residual=residual
    )
    composed = ops.linear(x, w, bias, activation=activation, residual=residual)
    exact = reference.linear(
        x.double(),
        w.double(),
        None if bias is None else bias.double(),
        activation=activation,
        residual=None if residual is None else residual.double(),
    )
    theirs = reference.linear(
        x, w, None if bias is None else bias.to(dtype), activation=activation, residual=residual
    )
    assert_no_worse(fused, theirs, exact)
    assert_no_worse(composed, theirs, exact)


@pytest.mark.parametrize("op", ["linear", "packed fp32", "packed bf16", "linear bf16"])
def test_threads_and_repeats_agree(isa: str, threads: None, op: str) -> None:
    """The sum of an element does not depend on how the product is cut over threads."""
    for m, n, k in [(1, 400, 600), (8, 330, 515), (67, 129, 300), (400, 40, 64), (5, 40, 9000)]:
        x, w = torch.randn(m, k), torch.randn(n, k)
        panels = ops.pack_linear_weight(w, "bf16" if op == "packed bf16" else "fp32")
        results = []
        for count in (1, 2, 2, 3):
            torch.set_num_threads(count)
            if op.startswith("packed"):
                results.append(ops.linear_packed(x, panels, n))
            else:
                results.append(ops.linear(x, w, precision="bf16" if "bf16" in op else "fp32"))
        for result in results[1:]:
            assert_exact(result, results[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("packed", [None, *PRECISIONS])
def test_rows_do_not_depend_on_the_batch(isa: str, packed: str | None, dtype: torch.dtype) -> None:
    x, w = torch.randn(23, 600).to(dtype), torch.randn(50, 600).to(dtype)
    panels = None if packed is None else ops.pack_linear_weight(w, packed)

    def run(rows: Tensor) -> Tensor:
        return ops.linear(rows, w) if panels is None else ops.linear_packed(rows, panels, 50)

    whole = run(x)
    for begin, end in [(0, 1), (22, 23), (3, 5), (4, 7), (6, 10), (8, 16), (1, 22)]:
        assert_exact(run(x[begin:end]), whole[begin:end])


def test_tiers_agree() -> None:
    """fp32 results differ between tiers by rounding only: FMA or not, and the order of sums."""
    x, w, b = torch.randn(37, 700), torch.randn(83, 700), torch.randn(83)
    exact, theirs = linear64(x, w, b), F.linear(x, w, b)
    results = {}
    for name in available_isas():
        with force_isa(name):
            results[name] = ops.linear(x, w, b)
            assert _native.last_kernel() == f"gemm_f32.{name}"
    for result in results.values():
        assert_no_worse(result, theirs, exact)
        assert (result - results["scalar"]).abs().max() <= 700 * 2**-24 * exact.abs().max()


def test_names_of_enums() -> None:
    x, w = torch.randn(2, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"activation must be one of .*relu.*; got 'swish'"):
        ops.linear(x, w, activation="swish")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"activation must be one of .*; got 'swish'"):
        ops.linear_packed(x, ops.pack_linear_weight(w), 3, activation="swish")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"precision must be 'fp32' or 'bf16'; got 'tf32'"):
        ops.linear(x, w, precision="tf32")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"precision must be 'fp32' or 'bf16'; got 'int8'"):
        ops.pack_linear_weight(w, "int8")  # type: ignore[arg-type]
