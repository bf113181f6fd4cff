"""Transposed convolution: values, gradients, layouts, against float64 under the policy."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import (
    CONV_TRANSPOSE,
    FLOATS,
    WINOGRAD4,
    WINOGRAD_RELATIVE,
    Geometry,
    channels_last,
    image_layouts,
    same,
)
from torch import Tensor

from pybigmodel import _native, ops
from pybigmodel.reference import conv as reference
from pybigmodel.testing import assert_exact, assert_no_worse, measure_error

OURS = {1: ops.conv_transpose1d, 2: ops.conv_transpose2d, 3: ops.conv_transpose3d}
F32 = torch.float32
raw = torch.ops.pybigmodel.conv_transpose
raw_backward = torch.ops.pybigmodel.conv_transpose_backward

# channels are those of the transposed one, in and out. Padding is torch's, as much on either side.
GEOMETRIES = [
    Geometry(1, (1, 1), (1, 1), (1, 1)),
    Geometry(2, (20, 33), (5, 4), (1, 1), stride=(2, 3), output_padding=(1, 0)),  # without a tap
    Geometry(2, (16, 32), (6, 5), (2, 2), stride=(2, 2)),
    Geometry(2, (17, 15), (5, 6), (4, 4), stride=(2, 2), padding=((1, 1), (1, 1))),
    Geometry(2, (20, 5), (7, 6), (5, 3), padding=((2, 2), (0, 0))),  # stride 1
    Geometry(1, (20, 18), (9, 8), (3, 3), padding=((2, 2), (1, 1))),  # Winograd
    Geometry(1, (9, 40), (6, 7), (3, 3), padding=((3, 3), (3, 3))),  # more than its reach
    Geometry(2, (12, 10), (5, 6), (3, 3), stride=(2, 2), padding=same(3, 3), output_padding=(1, 1)),
    Geometry(1, (12, 10), (5, 4), (3, 3), stride=(2, 1), dilation=(2, 3), output_padding=(0, 2)),
    Geometry(1, (6, 7), (4, 5), (2, 3), stride=(2, 1), dilation=(4, 1), output_padding=(3, 0)),
    Geometry(1, (6, 7), (4, 5), (2, 3), stride=(4, 5)),  # outputs that nothing reaches
    Geometry(1, (300, 20), (4, 4), (3, 3), stride=(2, 2)),
    Geometry(1, (3, 64), (9, 9), (4, 4), stride=(2, 2), padding=((1, 1), (1, 1))),
    Geometry(2, (24, 20), (5, 6), (3, 3), stride=(2, 2), groups=2),
    Geometry(1, (9, 21), (5, 4), (3, 2), groups=3, dilation=(1, 2)),
    Geometry(2, (20, 20), (6, 9), (3, 3), stride=(2, 2), padding=same(3, 3), groups=20),
    Geometry(2, (33, 33), (6, 5), (3, 3), padding=same(3, 3), groups=33),
    Geometry(1, (16, 16), (5, 5), (2, 2), stride=(3, 3), groups=16),  # kernel below the stride
    Geometry(1, (16, 16), (5, 6), (3, 3), stride=(2, 2), dilation=(2, 2), groups=16),
    Geometry(2, (20, 18), (11,), (5,), stride=(2,), padding=((2, 2),)),
    Geometry(2, (18, 20), (13,), (4,), stride=(3,), output_padding=(2,)),
    Geometry(1, (6, 17), (3, 4, 3), (3, 2, 3), stride=(1, 2, 2), output_padding=(0, 1, 0)),
    Geometry(1, (4, 4), (3, 3, 4), (2, 3, 2), stride=(2, 2, 1), groups=4),
]


def options(geometry: Geometry) -> dict[str, Any]:
    return {
        **geometry.options,
        "output_padding": geometry.output_padding or (0,) * geometry.axes,
    }


def make(geometry: Geometry, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    c, n = geometry.channels
    shape = (c, n // geometry.groups, *geometry.kernel)
    terms = c // geometry.groups * prod(geometry.kernel)
    weight = (torch.randn(shape) / terms**0.5).to(dtype)
    return torch.randn(geometry.batch, c, *geometry.size).to(dtype), weight, torch.randn(n)


def theirs(geometry: Geometry, x: Tensor, w: Tensor, b: Tensor | None) -> Tensor:
    o = options(geometry)
    padding = [before for before, _ in o["padding"]]
    function = CONV_TRANSPOSE[geometry.axes]
    return function(
        x, w, b, o["stride"], padding, o["output_padding"], geometry.groups, o["dilation"]
    )


def ran_winograd() -> bool:
    return _native.last_kernel().startswith("conv_winograd")


# The floor: see test_conv_backward.py.
def check(geometry: Geometry, winograd: bool, actual: Tensor, other: Tensor, exact: Tensor) -> None:
    assert actual.shape == exact.shape
    if winograd and actual.dtype == F32:
        assert measure_error(actual, exact).frobenius <= WINOGRAD_RELATIVE[WINOGRAD4]
    else:
        assert_no_worse(actual, other, exact, floor_ulps=6 if actual.numel() > 64 else 8)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_conv_transpose(isa: str, dtype: torch.dtype, geometry: Geometry) -> None:
    x, w, b = make(geometry, dtype)
    for bias in (None, b, b.to(dtype)):
        actual = OURS[geometry.axes](x, w, bias, **options(geometry))
        winograd = ran_winograd()
        assert _native.last_kernel().endswith("." + isa)
        other = theirs(geometry, x, w, None if bias is None else bias.to(dtype))
        wide = (t if t is None else t.double() for t in (x, w, bias))
        exact = reference.conv_transpose(*wide, **options(geometry))
        check(geometry, winograd, actual, other, exact)
        last = OURS[geometry.axes](channels_last(x), w, bias, **options(geometry))
        assert_exact(last, actual)
        assert_exact(OURS[geometry.axes](x[0], w, bias, **options(geometry)), actual[0])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_bf16_products(isa: str, geometry: Geometry) -> None:
    x, w, b = make(geometry, F32)
    actual = OURS[geometry.axes](x, w, b, precision="bf16", **options(geometry))
    rounded = (x.bfloat16().double(), w.bfloat16().double(), b.double())
    exact = reference.conv_transpose(*(t.double() for t in (x, w, b)), **options(geometry))
    depthwise = geometry.groups > 1 and geometry.channels == (geometry.groups,) * 2
    sums = exact if depthwise else reference.conv_transpose(*rounded, **options(geometry))
    # Depthwise products are fp32 ones, but for a dilated one, whose taps are those of direct.
    if depthwise and _native.last_kernel().startswith("conv_direct"):
        sums = reference.conv_transpose(*rounded, **options(geometry))
    assert measure_error(actual, sums).frobenius <= 1e-6
    assert measure_error(actual, exact).frobenius <= 2.0**-8


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients(isa: str, dtype: torch.dtype, geometry: Geometry) -> None:
    x, w, b = make(geometry, dtype)
    dy = torch.randn(theirs(geometry, x, w, None).shape).to(dtype)

    def gradients(f: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, b)]
        return torch.autograd.grad(f(*leaves), leaves, dy.to(dtype))

    ours = gradients(lambda *t: OURS[geometry.axes](*t, **options(geometry)), dtype)
    exact = gradients(lambda *t: reference.conv_transpose(*t, **options(geometry)), torch.float64)
    others = gradients(lambda *t: theirs(geometry, *t), dtype)
    # The gradient of the input is a convolution, that of the weight a sum over tiles.
    winograd = geometry.kernel == (3, 3) and not geometry.stride and not geometry.dilation
    for i, triple in enumerate(zip(ours, others, exact, strict=True)):
        check(geometry, winograd and i < 2, *triple)


def test_asymmetric_padding(isa: str) -> None:
    """So many pixels of the whole result are cut off."""
    x, w, b = make(Geometry(2, (12, 10), (5, 6), (3, 4)), F32)
    whole = ops.conv_transpose2d(x, w, b, stride=(2, 3))
    for (top, bottom), (left, right) in [((0, 1), (2, 0)), ((1, 2), (1, 3)), ((3, 0), (0, 0))]:
        cut = whole[:, :, top : whole.shape[2] - bottom, left : whole.shape[3] - right]
        y = ops.conv_transpose2d(x, w, b, (2, 3), ((top, bottom), (left, right)))
        exact = reference.conv_transpose(
            x.double(),
            w.double(),
            b.double(),
            stride=(2, 3),
            padding=((top, bottom), (left, right)),
            output_padding=(0, 0),
            dilation=(1, 1),
        )
        assert_no_worse(y, cut, exact)


@pytest.mark.parametrize("geometry", [GEOMETRIES[i] for i in (3, 5, 7, 13, 15, 19)], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(isa: str, dtype: torch.dtype, geometry: Geometry) -> None:
    """The layout of no argument changes one bit of the result or of a gradient, but for the bias',
    whose sum follows it."""
    x, w, b = make(geometry, dtype)
    o, raw_options = options(geometry), geometry.raw
    stride, padding, dilation, groups = raw_options
    forward = (stride, padding, list(o["output_padding"]), dilation, groups, 0, False)
    geometric = (stride, padding, dilation, groups, 0, False)
    y = raw(x, w, b, *forward, False)
    dy = torch.randn(y.shape).to(dtype)
    plain = raw_backward(dy, x, w, *geometric, False, True, True, True)
    axes = (0, *range(2, dy.dim()))
    their_db, exact_db = dy.float().sum(axes), dy.double().sum(axes)
    for (kind, xs), (_, ws), (_, dys) in zip(
        image_layouts(x), image_layouts(w), image_layouts(dy), strict=True
    ):
        for last in (False, True):
            for image, weight in ((xs, w), (x, ws)):
                assert_exact(raw(image, weight, b, *forward, last), y), kind
            for arguments in ((dys, x, w), (dy, xs, w), (dy, x, ws)):
                got = raw_backward(*arguments, *geometric, last, True, True, True)
                for actual, expected in zip(got[:2], plain[:2], strict=True):
                    assert_exact(actual, expected), kind
                check(geometry, False, got[2], their_db, exact_db)


@pytest.mark.parametrize("axes", [2, 3])
def test_result_layout(axes: int) -> None:
    """channels_last if one of the two is, beyond what a size of 1 leaves open."""
    x, w = torch.randn(2, 6, *[5] * axes), torch.randn(6, 4, *[3] * axes)
    for image in (x, channels_last(x)):
        for weight in (w, channels_last(w)):
            y = OURS[axes](image, weight)
            last = image is not x or weight is not w
            assert y.stride() == (channels_last(y) if last else y.contiguous()).stride()


@pytest.mark.parametrize(("n", "c", "o"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty(isa: str, dtype: torch.dtype, stride: int, n: int, c: int, o: int) -> None:
    x, w, b = torch.randn(n, c, 5, 6).to(dtype), torch.randn(c, o, 3, 3).to(dtype), torch.randn(o)
    leaves = [t.requires_grad_() for t in (x, w, b.to(dtype))]
    y = ops.conv_transpose2d(*leaves, stride=stride)
    size = (7, 8) if stride == 1 else (11, 13)
    assert_exact(y, leaves[2].view(-1, 1, 1).expand(n, o, *size))
    dy = torch.randn_like(y)
    dx, dw, db = torch.autograd.grad(y, leaves, dy)
    assert_exact(dx, torch.zeros_like(x))
    assert_exact(dw, torch.zeros_like(w))
    if n:
        assert_no_worse(db, dy.sum((0, 2, 3)), dy.double().sum((0, 2, 3)))
    else:
        assert_exact(db, torch.zeros_like(db))


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(3, (40, 70), (9, 8), (4, 4), stride=(2, 2)),
        Geometry(9, (40, 20), (3, 3), (3, 3), padding=same(3, 3)),
        Geometry(2, (70, 70), (19, 21), (3, 3), stride=(2, 2), groups=70),
        Geometry(2, (32, 48), (40,), (5,), stride=(3,), groups=2),
    ],
    ids=str,
)
def test_threads_and_repeats_agree(isa: str, threads: None, geometry: Geometry) -> None:
    x, w, b = make(geometry, F32)
    dy = torch.randn(theirs(geometry, x, w, None).shape)
    results = []
    for count in (1, 2, 2, 3, 5):
        torch.set_num_threads(count)
        leaves = [t.detach().requires_grad_() for t in (x, w, b)]
        y = OURS[geometry.axes](*leaves, **options(geometry))
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy)))
    for other in results[1:]:
        for a, expected in zip(other, results[0], strict=True):
            assert_exact(a, expected)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite(isa: str, bad: float) -> None:
    """It reaches the outputs that see it, and those only."""
    for geometry in GEOMETRIES:
        x, w, b = make(geometry, F32)
        clean = OURS[geometry.axes](x, w, b, **options(geometry))
        if ran_winograd():
            continue
        at = (0, 0, *(size // 2 for size in geometry.size))
        x[at] = bad
        y = OURS[geometry.axes](x, w, b, **options(geometry))
        seen = torch.zeros_like(x)
        seen[at] = 1
        sees = reference.conv_transpose(seen, w.abs() + 1, **options(geometry)) > 0
        assert sees.any() and not y[sees].isfinite().any()
        assert_exact(y[~sees], clean[~sees])


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_reference(geometry: Geometry) -> None:
    x, w, b = (t.double() for t in make(geometry, F32))
    actual = reference.conv_transpose(x, w, b, **options(geometry))
    torch.testing.assert_close(actual, theirs(geometry, x, w, b), rtol=1e-12, atol=1e-12)


def test_gradients_of_the_reference() -> None:
    geometry = Geometry(1, (4, 2), (3, 2), (2, 3), stride=(2, 1), dilation=(1, 2), groups=2)
    leaves = [t.double().requires_grad_() for t in make(geometry, F32)]
    assert torch.autograd.gradcheck(
        lambda *t: reference.conv_transpose(*t, **options(geometry)), leaves
    )


# --- what is refused ----------------------------------------------------------------------------


def test_output_padding_is_smaller_than_a_step() -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(4, 3, 3, 3)
    for output_padding in (2, (0, 3), -1):
        with pytest.raises(RuntimeError, match=r"conv_transpose: output_padding must be at least"):
            ops.conv_transpose2d(x, w, stride=2, output_padding=output_padding)
        with pytest.raises(RuntimeError):  # torch agrees
            F.conv_transpose2d(x, w, stride=2, output_padding=output_padding)
    with pytest.raises(RuntimeError, match=r"padding leaves nothing of the output"):
        ops.conv_transpose2d(x, w, padding=4)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stride", (1, 2, 3)),
        ("output_padding", "same"),
        ("padding", "same"),
        ("padding", "valid"),
        ("padding", (1, 2, 3)),
        ("dilation", 1.0),
    ],
)
def test_geometries_of_another_form(name: str, value: Any) -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(4, 3, 3, 3)
    with pytest.raises(ValueError, match=rf"conv_transpose2d: {name} must be"):
        ops.conv_transpose2d(x, w, **{name: value})


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_dimensions_of_the_input(axes: int) -> None:
    for dim in (axes, axes + 3):
        with pytest.raises(RuntimeError, match=rf"conv_transpose{axes}d: input must have"):
            OURS[axes](torch.randn([4] * dim), torch.randn(4, 4, *[3] * axes))


@pytest.mark.parametrize("sizes", [(0, 5, 5), (3, 0, 5), (3, 5, 0)])
def test_images_without_pixels_are_refused(sizes: tuple[int, ...]) -> None:
    x, w = torch.zeros(1, 16, *sizes), torch.ones(16, 2, 1, 3, 3)
    with pytest.raises(RuntimeError, match=r"conv_transpose: input must have pixels, got shape"):
        ops.conv_transpose3d(x, w, output_padding=(1, 0, 0), dilation=(2, 1, 1))


# --- the algorithm ------------------------------------------------------------------------------


def test_direct_is_not_winograd() -> None:
    x = torch.randn(2, 64, 12, 12, requires_grad=True)
    w = torch.randn(64, 64, 3, 3, requires_grad=True)
    for algorithm, expected in (("auto", "winograd"), ("direct", "direct")):
        y = ops.conv_transpose2d(x, w, padding=1, algorithm=algorithm)
        assert f"conv_{expected}" in _native.last_kernel()
        torch.autograd.grad(y.sum(), x)
        assert f"conv_{expected}" in _native.last_kernel()
    with pytest.raises(ValueError, match=r"algorithm must be 'auto' or 'direct'"):
        ops.conv_transpose2d(x, w, algorithm="winograd2")


def test_strides_beyond_the_image() -> None:
    """As many phases as there are pixels, not as strides: 25 million would take minutes."""
    x, w = torch.randn(1, 32, 1, 1), torch.randn(32, 16, 5, 5)
    y = ops.conv_transpose2d(x, w, stride=5000)
    torch.testing.assert_close(y, F.conv_transpose2d(x, w, stride=5000))
