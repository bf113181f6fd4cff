"""NaN, infinity, subnormals, huge values in direct convolution: nothing hides, nothing spreads.

Winograd's, which spread over tiles, are in test_conv_winograd.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conv_cases import (
    ACTIVATIONS,
    FLOATS,
    GEOMETRIES,
    WINOGRAD2,
    WINOGRAD4,
    Case,
    Geometry,
    conv,
    make_case,
    same,
)
from torch import Tensor

from pybigmodel import ops
from pybigmodel.reference import conv as reference
from pybigmodel.testing import assert_exact, assert_no_worse

F32 = torch.float32


def exact_algorithms(geometry: Geometry) -> list[int]:
    return [a for a in geometry.algorithms(True) if a not in (WINOGRAD2, WINOGRAD4)]


def seen_by(geometry: Geometry, x: Tensor, w: Tensor, at: tuple[int, ...]) -> Tensor:
    """The outputs, of all channels of the group, that a pixel has a part in."""
    one = torch.zeros(x.shape)
    one[at] = 1
    return reference.conv(one, torch.ones(w.shape), **geometry.options) > 0


@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES[::2], ids=str)
def test_a_bad_pixel(isa: str, geometry: Geometry, dtype: torch.dtype, bad: float) -> None:
    case = make_case(geometry, dtype)
    original, w = case.inputs[0], case.weight
    n, c, *size = original.shape
    for at in {
        (0, 0, *(0 for _ in size)),
        (n - 1, c - 1, *(s - 1 for s in size)),
        (0, c // 2, *(s // 2 for s in size)),
    }:
        x = original.clone()
        x[at] = bad
        sees = seen_by(geometry, x, w, at)
        for algorithm in exact_algorithms(geometry):
            clean, y = conv(case, original, algorithm), conv(case, x, algorithm)
            assert not y[sees].isfinite().any()
            if bad == bad:
                assert_exact(y[sees], exact64(geometry, x, w)[sees].to(dtype))
            assert_exact(y[~sees], clean[~sees])


def exact64(geometry: Geometry, x: Tensor, w: Tensor) -> Tensor:
    return reference.conv(x.double(), w.double(), **geometry.options)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("geometry", [g for g in GEOMETRIES if g.channels[1] > 1], ids=str)
def test_a_bad_weight_spoils_its_channel_only(isa: str, geometry: Geometry, bad: float) -> None:
    case = make_case(geometry, F32)
    x, w, last = case.inputs[0], case.weight.clone(), geometry.channels[1] - 1
    middle = tuple(k // 2 for k in geometry.kernel)
    w[(last, 0, *middle)] = bad
    for algorithm in exact_algorithms(geometry):
        y = conv(Case(geometry, [x], w), x, algorithm)
        assert_exact(y[:, :last], conv(case, x, algorithm)[:, :last])
        # Outputs whose tap lies outside the image may multiply it with a zero, or leave it out.
        inside = exact64(geometry, torch.ones_like(x), (w != w) | (w == bad))[:, last] > 0
        assert not y[:, last][inside].isfinite().any()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("where", ["bias", "residual"])
@pytest.mark.parametrize("algorithm", ["direct", "winograd2", "winograd4", "depthwise"])
def test_epilogues_pass_on_what_is_not_finite(
    isa: str, algorithm: str, where: str, activation: str
) -> None:
    groups = 20 if algorithm == "depthwise" else 1
    w = torch.zeros(20, 20 // groups, 3, 3)
    packed = ops.pack_conv_weight(w, groups=groups, algorithm=algorithm)
    values = torch.zeros(20)
    values[:3] = torch.tensor([torch.nan, torch.inf, -torch.inf])
    spread = values.view(-1, 1, 1).expand(2, 20, 5, 6)
    y = ops.conv_packed(
        torch.randn(2, 20, 5, 6),
        packed,
        20,
        (3, 3),
        values if where == "bias" else None,
        padding=1,
        groups=groups,
        algorithm=algorithm,
        activation=activation,
        residual=spread if where == "residual" else None,
    )
    expected = reference.activate(spread.double(), activation).float()
    finite = expected.isfinite()
    assert y[:, 0].isnan().all()
    assert_exact(y[finite], expected[finite])
    # Infinities become NaN where torch's formula is ∞·0; none becomes a number.
    assert not y[~finite].isfinite().any()


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_huge_and_subnormal(isa: str, geometry: Geometry) -> None:
    """1e36 is far from overflow, and no step on the way may overflow; subnormals are kept."""
    case = make_case(geometry, F32)
    x, w = case.inputs[0], case.weight
    for algorithm in exact_algorithms(geometry):
        huge = conv(case, x * 1e36, algorithm)
        assert_no_worse(
            huge,
            exact64(geometry, x * 1e36, w).float(),
            exact64(geometry, x * 1e36, w),
            floor_ulps=8,
        )
        tiny, exact = conv(case, x * 1e-39, algorithm), exact64(geometry, x * 1e-39, w)
        terms = w[0].numel()
        assert ((tiny.double() - exact).abs() <= terms * 2.0**-149 + exact.abs() * 2.0**-20).all()


def test_flushed_subnormals(isa: str) -> None:
    """torch.set_flush_denormal changes the FPU's mode under the kernels' feet: they stay right."""
    geometry = Geometry(2, (16, 20), (8, 9), (3, 3), padding=same(3, 3))
    case = make_case(geometry, F32)
    x = case.inputs[0].clone()
    x[0] *= 1e-38
    expected = {a: conv(case, x, a)[1] for a in geometry.algorithms(False)}
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        for algorithm, result in expected.items():
            y = conv(case, x, algorithm)
            assert_exact(y[1], result)
            assert (y[0].abs() < 1e-35).all()
    finally:
        torch.set_flush_denormal(False)


def test_fp16_beyond_its_range_inside() -> None:
    """fp32 accumulators: sums leave fp16's range on the way and come back."""
    x = torch.cat([torch.full((1, 32, 4, 4), 3e4), torch.full((1, 32, 4, 4), -3e4)], 1).half()
    w = torch.ones(18, 64, 3, 3).half()
    assert_exact(ops.conv2d(x, w), torch.zeros(1, 18, 2, 2).half())
    overflow = ops.conv2d(x[:, :32], w[:, :32])
    assert_exact(overflow, torch.full((1, 18, 2, 2), torch.inf).half())
    assert_exact(overflow, F.conv2d(x[:, :32].float(), w[:, :32].float()).half())
