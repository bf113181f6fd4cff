"""conv and conv_packed: values of every algorithm, epilogues, empty tensors, and the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_cases import (
    ACTIVATIONS,
    DEPTHWISE,
    DIRECT,
    FLOATS,
    GEOMETRIES,
    NAMES,
    OURS,
    WINOGRAD2,
    WINOGRAD4,
    Case,
    Geometry,
    channels_last,
    check_products,
    conv,
    kernel_of,
    make_case,
    same,
    torch_conv,
)
from torch import Tensor

from pybigmodel import _native, ops
from pybigmodel.reference import conv as reference
from pybigmodel.testing import assert_exact, assert_no_worse

F32 = torch.float32
PRECISIONS = ["fp32", "bf16"]


def without_winograd(geometry: Geometry, bf16: bool) -> list[int]:
    return [a for a in geometry.algorithms(bf16) if a not in (WINOGRAD2, WINOGRAD4)]


def is_bf16(precision: int, dtype: torch.dtype) -> bool:
    return precision == 1 or dtype == torch.bfloat16


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("precision", [0, 1], ids=PRECISIONS)
def test_every_algorithm(isa: str, precision: int, dtype: torch.dtype, geometry: Geometry) -> None:
    """Winograd's are in test_conv_winograd.py, by the bound that it states."""
    case, bf16 = make_case(geometry, dtype), is_bf16(precision, dtype)
    for algorithm in without_winograd(geometry, bf16):
        actual = case.run(algorithm, precision)
        assert _native.last_kernel() == kernel_of(geometry, algorithm, bf16, isa)
        check_products(case, algorithm, precision, actual)
        assert_exact(case.run(algorithm, precision, channels_last=True), actual)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_packed(isa: str, precision: str, dtype: torch.dtype, geometry: Geometry) -> None:
    """To the bit what conv computes that packs on the way, of any input beside the weight."""
    case, code = make_case(geometry, dtype, bias=True), PRECISIONS.index(precision)
    x, n = case.inputs[0], geometry.channels[1]
    bf16 = is_bf16(code, dtype)
    for algorithm in geometry.algorithms(bf16):
        packed = ops.pack_conv_weight(
            case.weight, groups=geometry.groups, precision=precision, algorithm=NAMES[algorithm]
        )
        assert packed.dtype == (torch.bfloat16 if bf16 and algorithm != DEPTHWISE else F32)
        expected = conv(case, x, algorithm, code)
        options = {**geometry.options, "algorithm": NAMES[algorithm]}
        y = ops.conv_packed(x, packed, n, geometry.kernel, case.bias, **options)
        assert _native.last_kernel() == kernel_of(geometry, algorithm, bf16, isa)
        assert_exact(y, expected)
        if dtype == F32 and not bf16:
            mixed = ops.conv_packed(x.bfloat16(), packed, n, geometry.kernel, case.bias, **options)
            again = conv(case, x.bfloat16().float(), algorithm, code)
            assert_exact(mixed, again.bfloat16())


@pytest.mark.parametrize("bias_dtype", ["input", "float32"])
@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_epilogue(
    isa: str, dtype: torch.dtype, activation: str, with_residual: bool, bias_dtype: str
) -> None:
    """One algorithm after the other; the residual is added before the activation."""
    epilogue: dict[str, Any] = {"activation": activation, "negative_slope": 0.2}
    results = []
    for geometry in EPILOGUES:
        case, n = make_case(geometry, dtype), geometry.channels[1]
        x, wide = case.inputs[0], torch.randn(n)
        bias = wide.to(dtype) if bias_dtype == "input" else wide
        r = torch.randn(conv(case, x, DIRECT).shape).to(dtype) if with_residual else None
        (algorithm,) = geometry.algorithms(True)[-1:]
        packed = ops.pack_conv_weight(
            case.weight, groups=geometry.groups, algorithm=NAMES[algorithm]
        )
        options = {**geometry.options, **epilogue}
        for image in (x, channels_last(x)):
            fused = ops.conv_packed(
                image,
                packed,
                n,
                geometry.kernel,
                bias,
                residual=r,
                algorithm=NAMES[algorithm],
                **options,
            )
            composed = OURS[geometry.axes](
                image, case.weight, bias, residual=r, algorithm="direct", **options
            )
            wider = (t if t is None else t.double() for t in (x, case.weight, bias, r))
            x64, w64, b64, r64 = wider
            exact = reference.conv(x64, w64, b64, residual=r64, **options)
            sums = torch_conv(geometry, x, case.weight, bias.to(dtype))
            theirs = reference.activate(sums if r is None else sums + r, activation, 0.2)
            results.append((fused, composed, theirs, exact))
    # Together, since a single element may be luckier than any bound.
    fused, composed, theirs, exact = (
        torch.cat([t.flatten() for t in ts]) for ts in zip(*results, strict=True)
    )
    assert_no_worse(fused, theirs, exact)
    assert_no_worse(composed, theirs, exact)


EPILOGUES = [
    Geometry(2, (20, 33), (5, 9), (1, 1)),
    Geometry(2, (16, 33), (8, 9), (3, 3), padding=same(3, 3), groups=1, dilation=(1, 2)),
    Geometry(2, (3, 17), (9, 12), (5, 3), stride=(2, 1), padding=((2, 1), (0, 2))),
    Geometry(2, (20, 20), (8, 9), (3, 3), padding=same(3, 3), groups=20),
    Geometry(2, (24, 36), (7, 6), (3, 3), padding=same(3, 3), groups=2),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_epilogue_of_winograd(isa: str, activation: str) -> None:
    """What is done to the sums that the same algorithm computes without it."""
    case = make_case(Geometry(2, (16, 33), (7, 9), (3, 3), padding=same(3, 3)), F32)
    x, bias = case.inputs[0], torch.randn(33)
    for algorithm in ("winograd2", "winograd4"):
        packed = ops.pack_conv_weight(case.weight, algorithm=algorithm)
        plain = ops.conv_packed(x, packed, 33, (3, 3), padding=1, algorithm=algorithm)
        r = torch.randn_like(plain)
        fused = ops.conv_packed(
            x,
            packed,
            33,
            (3, 3),
            bias,
            padding=1,
            algorithm=algorithm,
            activation=activation,
            residual=r,
        )
        sums = plain + bias.view(-1, 1, 1) + r
        exact = reference.activate(sums.double(), activation)
        assert_no_worse(fused, reference.activate(sums, activation), exact)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_wrappers(geometry: Geometry) -> None:
    """Batched and not, with bias, in every precision: what the op computes."""
    case = make_case(geometry, F32, bias=True)
    x, function = case.inputs[0], OURS[geometry.axes]
    for precision, name in enumerate(PRECISIONS):
        y = function(x, case.weight, case.bias, precision=name, **geometry.options)
        assert_exact(y, conv(case, x, 0, precision))
        first = function(x[0], case.weight, case.bias, precision=name, **geometry.options)
        assert_exact(first, conv(case, x[:1], 0, precision)[0])
        if name == "fp32":
            r = torch.randn_like(first)
            y = function(x[0], case.weight, case.bias, residual=r, **geometry.options)
            assert_exact(y, first + r)


@pytest.mark.parametrize(
    ("n", "c", "o"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0), (0, 5, 0), (2, 0, 0)]
)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty(isa: str, dtype: torch.dtype, n: int, c: int, o: int) -> None:
    """No images, no channels to sum over, or none to compute."""
    geometry = Geometry(n, (c, o), (5, 6), (3, 3), padding=same(3, 3))
    x, w = torch.randn(n, c, 5, 6).to(dtype), torch.randn(o, c, 3, 3).to(dtype)
    b, r = torch.randn(o).to(dtype), torch.randn(n, o, 5, 6).to(dtype)
    expected = b.view(-1, 1, 1).expand(n, o, 5, 6)
    for algorithm in geometry.algorithms(dtype == torch.bfloat16):
        for last in (False, True):
            case = Case(geometry, [], w, b)
            assert_exact(conv(case, x, algorithm, channels_last=last), expected)
            packed = ops.pack_conv_weight(w, algorithm=NAMES[algorithm])
            y = ops.conv_packed(
                x,
                packed,
                o,
                (3, 3),
                b,
                padding=1,
                algorithm=NAMES[algorithm],
                activation="relu",
                residual=r,
                channels_last=last,
            )
            assert_exact(y, (expected.float() + r.float()).to(dtype).relu())
    assert_exact(ops.conv2d(x, w, b, padding=1), expected)


# --- the oracle ---------------------------------------------------------------------------------


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_reference(geometry: Geometry) -> None:
    case = make_case(geometry, torch.float64, bias=True)
    case.bias = case.bias.double() if case.bias is not None else None
    expected = case.theirs(torch.float64)
    torch.testing.assert_close(case.exact(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("geometry", [GEOMETRIES[i] for i in (14, 19, 22, 25)], ids=str)
def test_gradients_of_the_reference(geometry: Geometry) -> None:
    small = Geometry(
        1,
        (geometry.groups, 2 * geometry.groups),
        tuple(5 for _ in geometry.size),
        tuple(2 for _ in geometry.kernel),
        geometry.stride,
        geometry.padding,
        tuple(1 for _ in geometry.dilation),
        geometry.groups,
    )
    case = make_case(small, torch.float64)

    def f(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return reference.conv(x, w, b, activation="silu", **small.options)

    leaves = (case.inputs[0], case.weight, torch.randn(small.channels[1]).double())
    assert torch.autograd.gradcheck(f, [t.requires_grad_() for t in leaves])
