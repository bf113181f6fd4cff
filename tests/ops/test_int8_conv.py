"""int8_conv: values to the bit of the integers, epilogues, layouts, tiers, threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import (
    ACTIVATIONS,
    FLOATS,
    GEOMETRIES,
    Geometry,
    channels_last,
    image_layouts,
    same,
)
from int8_conv_cases import Filters, image, same_bytes, within_rounding
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from pybigmodel import _native, ops
from pybigmodel.ops._checks import MAX_INT8_K
from pybigmodel.reference.int8_conv import dequantize, quantize
from pybigmodel.testing import assert_exact, available_isas, force_isa

U8 = torch.uint8
STATIC = {"input_scale": 0.0173, "input_zero_point": 91}
OUT = {"output_scale": 0.37, "output_zero_point": 103}
PLAIN = Geometry(2, (20, 33), (7, 9), (3, 3), padding=same(3, 3))
# Both sides of what the kernel cuts at beside those of the floating ones: 4 channels to a lane.
MORE = [
    Geometry(1, (4, 16), (9, 10), (3, 3), padding=same(3, 3)),
    Geometry(1, (17, 16), (9, 10), (3, 3), padding=((2, 0), (0, 3)), stride=(2, 1)),
    Geometry(2, (64, 48), (14, 14), (3, 3), padding=same(3, 3)),
    Geometry(1, (128, 70), (7, 7), (1, 1)),
    Geometry(1, (3, 64), (30, 31), (7, 7), stride=(2, 2), padding=same(7, 7)),
    Geometry(2, (32, 64), (8, 9), (3, 3), padding=same(3, 3), groups=2),
]


@pytest.mark.parametrize("dtype", [*FLOATS, U8], ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES + MORE, ids=str)
def test_static(isa: str, geometry: Geometry, dtype: torch.dtype) -> None:
    filters, x = Filters(geometry), image(geometry, dtype)
    actual = filters.run(x, **STATIC)
    assert _native.last_kernel() == f"conv_direct_u8s8.{isa}"
    assert actual.dtype == (torch.float32 if dtype == U8 else dtype)
    within_rounding(actual, filters.exact(x, **STATIC))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES + MORE, ids=str)
def test_dynamic(isa: str, geometry: Geometry, dtype: torch.dtype) -> None:
    filters, x = Filters(geometry), image(geometry, dtype)
    within_rounding(filters.run(x), filters.exact(x))


@pytest.mark.parametrize("geometry", GEOMETRIES + MORE, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, U8], ids=str)
def test_to_bytes(isa: str, dtype: torch.dtype, geometry: Geometry) -> None:
    filters, x = Filters(geometry), image(geometry, dtype)
    bias = torch.randn(geometry.channels[1])
    exact = filters.exact(x, bias, **STATIC)
    scale = float(exact.abs().amax()) / 150  # some are beyond the range
    actual = filters.run(x, bias, **STATIC, output_scale=scale, output_zero_point=90)
    same_bytes(actual, exact, scale, 90)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("residual", [None, "float", "bytes"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [*FLOATS, U8], ids=str)
@pytest.mark.parametrize("to_bytes", [False, True])
def test_epilogue(
    isa: str,
    to_bytes: bool,
    dtype: torch.dtype,
    activation: str,
    residual: str | None,
    with_bias: bool,
) -> None:
    filters, x = Filters(PLAIN), image(PLAIN, dtype)
    floating = torch.float32 if dtype == U8 else dtype
    options: dict[str, Any] = {"activation": activation, "negative_slope": 0.2, **STATIC}
    if residual == "float":
        options["residual"] = torch.randn(2, 33, 7, 9).to(torch.float32 if to_bytes else floating)
    elif residual == "bytes":
        options["residual"] = torch.randint(0, 256, (2, 33, 7, 9), dtype=U8)
        options |= {"residual_scale": 0.031, "residual_zero_point": 120}
    bias = torch.randn(33).to(floating) if with_bias else None
    exact = filters.exact(x, bias, **options)
    actual = filters.run(x, bias, **options, **(OUT if to_bytes else {}))
    if to_bytes:
        same_bytes(actual, exact, *OUT.values())
    else:
        within_rounding(actual, exact, ulps=8)


@pytest.mark.parametrize("zero_point", [0, 1, 128, 255])
@pytest.mark.parametrize("geometry", [PLAIN, *MORE[:3]], ids=str)
def test_zero_points(isa: str, geometry: Geometry, zero_point: int) -> None:
    """Padding stands for 0 whatever the zero point is."""
    filters = Filters(geometry)
    for dtype in (torch.float32, U8):
        x = image(geometry, dtype)
        options = {"input_scale": 0.01, "input_zero_point": zero_point}
        within_rounding(filters.run(x, **options), filters.exact(x, **options))
    blank = torch.full_like(image(geometry, U8), zero_point)
    assert not filters.run(blank, **options).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, U8], ids=str)
def test_layouts(isa: str, dtype: torch.dtype) -> None:
    """To the bit the same, whatever the layouts of image, residual and result are."""
    filters, x = Filters(PLAIN), image(PLAIN, dtype)
    floating = torch.float32 if dtype == U8 else dtype
    bias, residual = torch.randn(33), torch.randn(2, 33, 7, 9).to(floating)
    for more in ({}, OUT):
        r = residual.float() if more else residual
        plain = filters.run(x, bias, residual=r, **STATIC, **more)
        for _, view in image_layouts(x.float()):
            one = torch.empty_strided(view.shape, view.stride(), dtype=dtype).copy_(view)
            for last in (False, True, None):
                options = {"residual": r, "channels_last": last, **STATIC, **more}
                y = filters.run(one, bias, **options)
                assert_exact(y, plain)
                if last is not None:
                    assert y.is_contiguous() != last
        for _, view in [] if dtype == U8 else image_layouts(x):  # between NaN
            assert_exact(filters.run(view, bias, residual=r, **STATIC, **more), plain)
        for _, view in image_layouts(r):
            assert_exact(filters.run(x, bias, residual=view, **STATIC, **more), plain)


def test_bytes_of_a_view(isa: str) -> None:
    """uint8 images that are parts of others are read in place or copied, never beyond them."""
    filters = Filters(MORE[2])
    for x in (image(MORE[2], U8), channels_last(image(MORE[2], U8))):
        expected = filters.run(x, **STATIC)
        wide = torch.full((3, 70, 17, 18), 255, dtype=U8)
        if x.stride(1) == 1:
            wide = channels_last(wide)
        part = wide[1:, 3:67, 2:16, 1:15]
        part.copy_(x)
        assert_exact(filters.run(part, **STATIC), expected)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_not_finite(isa: str, dtype: torch.dtype) -> None:
    filters, x = Filters(PLAIN), image(PLAIN, dtype)
    for bad in (torch.nan, torch.inf, -torch.inf):
        spoilt = x.clone()
        spoilt[1, 5, 3, 2] = bad
        assert filters.run(spoilt).isnan().all()
        assert not filters.run(spoilt, **OUT).any()  # NaN is 0 of uint8
        within_rounding(filters.run(spoilt, **STATIC), filters.exact(spoilt, **STATIC))
    clamped = x.clone()
    clamped[1, 5, 3, 2] = 1e4
    at_end = dequantize(torch.tensor(255, dtype=U8), *STATIC.values())
    x[1, 5, 3, 2] = at_end.to(dtype)
    q = quantize(clamped, *STATIC.values())
    assert q[1, 5, 3, 2] == 255
    assert_exact(filters.run(clamped, **STATIC), filters.run(x, **STATIC))


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1e20, 1e34])
def test_small_and_large_images(isa: str, size: float) -> None:
    filters, x = Filters(PLAIN), image(PLAIN, torch.float32) * size
    exact = filters.exact(x)
    off = (filters.run(x).double() - exact).norm() / exact.norm()
    assert off <= 1e-6, f"relative error {off:.3g}"


def test_constant_images(isa: str) -> None:
    filters = Filters(PLAIN)
    for value in (0.0, 3.0, -0.25):
        x = torch.full((2, 20, 7, 9), value)
        within_rounding(filters.run(x), filters.exact(x))
    assert not filters.run(torch.zeros(2, 20, 7, 9)).any()


@pytest.mark.parametrize(
    ("n", "c", "o"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0), (0, 5, 0), (2, 0, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, U8], ids=str)
@pytest.mark.parametrize("static", [False, True])
def test_empty(isa: str, static: bool, dtype: torch.dtype, n: int, c: int, o: int) -> None:
    geometry = Geometry(n, (c, o), (5, 6), (3, 3), padding=same(3, 3))
    filters, x = Filters(geometry), image(geometry, dtype)
    b, r = torch.randn(o), torch.randn(n, o, 5, 6)
    options: dict[str, Any] = STATIC if static or dtype == U8 else {}
    for last in (False, True):
        y = filters.run(x, b, activation="relu", residual=r, channels_last=last, **options)
        assert y.shape == (n, o, 5, 6)
        if c == 0:
            assert_exact(y, (b.view(-1, 1, 1) + r).relu())
    assert filters.run(x, b, **options, **OUT).dtype == U8


def test_threads_and_repeats_agree(isa: str, threads: None) -> None:
    for geometry in (
        Geometry(1, (300, 70), (7, 7), (3, 3), padding=same(3, 3)),
        Geometry(2, (16, 40), (33, 31), (3, 3), padding=same(3, 3)),
        Geometry(1, (3, 40), (35, 37), (7, 7), stride=(2, 2), padding=same(7, 7)),
        Geometry(2, (64, 96), (20, 20), (1, 1)),
    ):
        filters, x = Filters(geometry), image(geometry, torch.float32)
        bias = torch.randn(geometry.channels[1])
        residual = torch.randn_like(filters.run(x))
        for options in ({}, {**STATIC, **OUT}):
            results = []
            for count in (1, 2, 2, 3, 5):
                torch.set_num_threads(count)
                results.append(filters.run(x, bias, residual=residual, **options))
            for result in results[1:]:
                assert_exact(result, results[0])


def test_images_do_not_depend_on_the_batch(isa: str) -> None:
    geometry = Geometry(5, (20, 33), (7, 9), (3, 3), padding=same(3, 3))
    filters, x = Filters(geometry), image(geometry, torch.float32)
    bias, residual = torch.randn(33), torch.randn(5, 33, 7, 9)
    whole = filters.run(x, bias, residual=residual, **STATIC)
    for begin, end in [(0, 1), (2, 4), (4, 5)]:
        part = residual[begin:end]
        assert_exact(filters.run(x[begin:end], bias, residual=part, **STATIC), whole[begin:end])


@pytest.mark.parametrize("geometry", [PLAIN, *MORE], ids=str)
def test_tiers_agree(geometry: Geometry) -> None:
    """Quantised values and integer sums to the bit; what follows them by a few roundings."""
    filters, x = Filters(geometry), image(geometry, torch.float32)
    bias, ones = torch.randn(geometry.channels[1]), torch.ones(geometry.channels[1])
    whole = Filters(geometry)
    whole.scale = ones
    sums = []
    for name in available_isas():
        with force_isa(name):
            sums.append(whole.run(x, input_scale=2.0**-6, input_zero_point=100))
            y = filters.run(x, bias, activation="relu", **STATIC)
            within_rounding(y, filters.exact(x, bias, activation="relu", **STATIC))
            codes = filters.run(x, bias, **STATIC, **OUT)
            same_bytes(codes, filters.exact(x, bias, **STATIC), *OUT.values())
    for one in sums[1:]:
        assert_exact(one, sums[0])


@pytest.mark.parametrize("sign", [1, -1])
def test_largest_sums(isa: str, sign: int) -> None:
    """65,793 products of 255 and −128: 10,368 short of overflow."""
    geometry = Geometry(1, (MAX_INT8_K // 9, 2), (3, 3), (3, 3))
    filters = Filters(geometry)
    filters.q.fill_(-128)
    filters.scale = torch.tensor([1.0, sign * 0.5])
    filters.packed = ops.pack_int8_conv_weight(filters.q)
    for zero_point in (0, 255):
        x = torch.full((1, MAX_INT8_K // 9, 3, 3), 255 - zero_point, dtype=U8)
        options = {"input_scale": 1.0, "input_zero_point": zero_point}
        within_rounding(filters.run(x, **options), filters.exact(x, **options))


def test_too_many_weights() -> None:
    packed = ops.pack_int8_conv_weight(torch.zeros(1, MAX_INT8_K + 1, 1, dtype=torch.int8))
    x = torch.zeros(1, MAX_INT8_K + 1, 1)
    with pytest.raises(RuntimeError, match=r"must be at most 65793.*got 65794"):
        ops.int8_conv(x, packed, torch.ones(1), (1,))


# --- wrappers -----------------------------------------------------------------------------------


def test_single_images() -> None:
    filters, x = Filters(PLAIN), image(PLAIN, torch.float32)
    residual = torch.randn(2, 33, 7, 9)
    whole = filters.run(x, residual=residual, **STATIC)
    assert_exact(filters.run(x[1], residual=residual[1], **STATIC), whole[1])
    options = {**PLAIN.options, **STATIC}
    assert_exact(
        ops.int8_conv2d(x, filters.packed, filters.scale, 3, **options), filters.run(x, **STATIC)
    )
    with pytest.raises(ValueError, match="int8_conv2d: kernel_size must be an int or 2 of them"):
        ops.int8_conv2d(x, filters.packed, filters.scale, (3, 3, 3))


def test_what_has_another_form() -> None:
    filters, x = Filters(PLAIN), image(PLAIN, torch.float32)
    with pytest.raises(ValueError, match=r"activation must be one of .*leaky_relu; got 'swish'"):
        filters.run(x, activation="swish")
    for name in ("input_scale", "residual_scale", "output_scale"):
        for bad in (0.0, -1.0, torch.nan):
            with pytest.raises(ValueError, match=f"int8_conv: {name} must be above 0, or None"):
                filters.run(x, **{name: bad})
    with pytest.raises(RuntimeError, match=r"input_scale must be above 0 where input is uint8"):
        filters.run(image(PLAIN, U8))
    with pytest.raises(RuntimeError, match=r"int8_conv: input must have 3 or 4 dimensions"):
        filters.run(x[0, 0])


@pytest.mark.parametrize("argument", ["x", "bias", "residual"])
def test_gradients_are_refused(argument: str) -> None:
    filters = Filters(PLAIN)
    given = {"x": image(PLAIN, torch.float32), "bias": torch.randn(33)}
    given["residual"] = torch.randn(2, 33, 7, 9)
    given[argument].requires_grad_()
    name = "input" if argument == "x" else argument
    with pytest.raises(RuntimeError, match=rf"int8_conv: {name} requires grad.*ops\.conv2d is"):
        filters.run(**given)
    with torch.no_grad():
        filters.run(**given)


def test_autocast() -> None:
    """Floating images take autocast's dtype; what belongs to a uint8 one stays."""
    filters, x, bias = Filters(PLAIN), image(PLAIN, torch.float32), torch.randn(33)
    residual = torch.randn(2, 33, 7, 9)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", dtype=dtype):
            y = filters.run(x, bias, residual=residual, **STATIC)
            to_bytes = filters.run(x, bias, residual=residual, **STATIC, **OUT)
            of_bytes = filters.run(image(PLAIN, U8), bias, residual=residual, **STATIC)
        low, b = x.to(dtype), bias.to(dtype)
        assert_exact(y, filters.run(low, b, residual=residual.to(dtype), **STATIC))
        assert_exact(to_bytes, filters.run(low, b, residual=residual, **STATIC, **OUT))
        assert of_bytes.dtype == torch.float32


@pytest.mark.parametrize("groups", [1, 4])
def test_counted_operations_are_torchs(groups: int) -> None:
    geometry = Geometry(2, (12, 20), (9, 8), (3, 2), stride=(2, 1), groups=groups)
    filters, x = Filters(geometry), image(geometry, torch.float32)
    with FlopCounterMode(display=False) as ours:
        filters.run(x)
    with FlopCounterMode(display=False) as theirs:
        F.conv2d(x, filters.q.float(), stride=(2, 1), groups=groups)
    assert ours.get_total_flops() == theirs.get_total_flops() > 0


class Two(nn.Module):
    """Bytes between two convolutions, and a packing within the graph."""

    def __init__(self, axes: int) -> None:
        super().__init__()
        there = Geometry(2, (8, 18), (9,) * axes, (3,) * axes, padding=same(*[3] * axes))
        back = Geometry(2, (18, 8), (9,) * axes, (1,) * axes)
        self.first, self.second = Filters(there), Filters(back)

    def forward(self, x: Tensor) -> Tensor:
        q = self.first.run(x, **STATIC, **OUT, activation="relu")
        scale, zero = OUT.values()
        self.second.packed = ops.pack_int8_conv_weight(self.second.q)
        y = self.second.run(q, input_scale=scale, input_zero_point=zero, residual=x)
        return self.first.run(y)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_compile_and_export(axes: int) -> None:
    torch._dynamo.reset()
    two = Two(axes)
    compiled = torch.compile(two, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (9, 12):
        x = torch.randn(2, 8, *[size] * axes)
        for one in (x, channels_last(x)):
            y = two(one)
            assert_exact(compiled(one), y)
            assert compiled(one).stride() == y.stride()
    size = torch.export.Dim("size", min=4, max=64)
    program = torch.export.export(two, (x,), dynamic_shapes=({2: size},))
    longer = torch.randn(2, 8, 20, *x.shape[3:])
    assert_exact(program.module()(longer), two(longer))
    torch._dynamo.reset()
