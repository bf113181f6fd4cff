"""What does not change conv's results: layouts, threads, the batch; the tier, but for rounding."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conv_cases import (
    DIRECT,
    FLOATS,
    GEOMETRIES,
    NAMES,
    OURS,
    THREADED,
    Case,
    Geometry,
    channels_last,
    check_products,
    conv,
    image_layouts,
    make_case,
    same,
)

from pybigmodel import ops
from pybigmodel.testing import assert_exact, available_isas, force_isa

F32 = torch.float32

# Few pixels, and enough of them for the threads to share.
LAYOUTS = [
    Geometry(2, (20, 33), (5, 9), (1, 1)),
    Geometry(2, (16, 32), (8, 9), (3, 3), padding=same(3, 3)),
    Geometry(2, (3, 17), (9, 12), (5, 3), stride=(2, 1), padding=((2, 1), (0, 2))),
    Geometry(2, (1, 17), (9, 12), (5, 5)),
    Geometry(2, (3, 17), (9, 12), (5, 5)),  # rows of the kernel that are read as one
    Geometry(3, (5, 1), (1, 1), (3, 3), padding=same(3, 3)),
    Geometry(2, (20, 20), (8, 19), (3, 3), padding=same(3, 3), groups=20),
    Geometry(2, (24, 20), (7, 6), (3, 3), padding=same(3, 3), groups=2),
    Geometry(2, (7, 18), (23,), (5,), stride=(2,), padding=((2, 3),)),
    Geometry(1, (6, 17), (4, 5, 6), (3, 2, 3), padding=((1, 1), (0, 1), (2, 0))),
]


@pytest.mark.parametrize("geometry", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(isa: str, dtype: torch.dtype, geometry: Geometry) -> None:
    """The layout of no argument changes one bit of the result."""
    case = make_case(geometry, dtype, bias=True)
    x, n, bf16 = case.inputs[0], geometry.channels[1], dtype == torch.bfloat16
    assert case.bias is not None
    strided_bias = case.bias.repeat_interleave(2)[::2]
    for algorithm in geometry.algorithms(bf16):
        plain = conv(case, x, algorithm)
        packed = ops.pack_conv_weight(
            case.weight, groups=geometry.groups, algorithm=NAMES[algorithm]
        )
        options = {**geometry.options, "algorithm": NAMES[algorithm], "activation": "relu"}
        r = torch.randn(plain.shape).to(dtype)
        fused = ops.conv_packed(x, packed, n, geometry.kernel, case.bias, residual=r, **options)
        for (kind, xs), (_, ws), (_, rs) in zip(
            image_layouts(x), image_layouts(case.weight), image_layouts(r), strict=True
        ):
            assert torch.equal(xs, x) and torch.equal(ws, case.weight) and torch.equal(rs, r)
            assert_exact(conv(case, xs, algorithm, channels_last=True), plain), kind
            other = Case(geometry, [x], ws, strided_bias)
            assert_exact(conv(other, x, algorithm), plain), kind
            y = ops.conv_packed(
                xs, packed, n, geometry.kernel, strided_bias, residual=rs, **options
            )
            assert_exact(y, fused), kind


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_expanded(isa: str, dtype: torch.dtype) -> None:
    """Stride 0 in any dimension of any argument."""
    one = torch.randn(1, 1, 1, 1).to(dtype)
    for shape, from_ in (
        ((3, 16, 7, 8), torch.randn(1, 16, 7, 8)),
        ((3, 16, 7, 8), torch.randn(3, 1, 7, 8)),
        ((3, 16, 7, 8), torch.randn(3, 16, 1, 8)),
        ((3, 16, 7, 8), torch.randn(3, 16, 7, 1)),
        ((3, 16, 7, 8), one),
    ):
        x = from_.to(dtype).expand(shape)
        w, b = one.expand(18, 16, 3, 3), one.view(1).expand(18)
        expected = ops.conv2d(x.contiguous(), w.contiguous(), b.contiguous(), padding="same")
        assert_exact(ops.conv2d(x, w, b, padding="same"), expected)
        d, e = one.expand(16, 1, 3, 3), one.view(1).expand(16)
        expected = ops.conv2d(x.contiguous(), d.contiguous(), e.contiguous(), groups=16)
        assert_exact(ops.conv2d(x, d, e, groups=16), expected)


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_result_layout_is_torchs(geometry: Geometry) -> None:
    """channels_last where torch's own is: for every layout of image and weight. It has no such
    layout in one dimension."""
    if geometry.axes == 1:
        x, w = torch.randn(2, geometry.channels[0], 40), torch.randn(geometry.weight_shape)
        y = ops.conv1d(channels_last(x), w, groups=geometry.groups)
        n, size = y.shape[1:]
        assert y.stride() == (n * size, 1, n)
        assert_exact(y, ops.conv1d(x, w, groups=geometry.groups))
        return
    stride, _, dilation, groups = geometry.raw
    c = geometry.channels[0]
    theirs = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}[geometry.axes]
    size = tuple(s + 8 for s in geometry.size)
    for _, x in image_layouts(torch.randn(2, c, *size)):
        for _, w in image_layouts(torch.randn(geometry.weight_shape)):
            expected = theirs(x, w, None, stride, 2, dilation, groups)
            actual = OURS[geometry.axes](x, w, None, stride, 2, dilation, groups)
            assert actual.stride() == expected.stride()


@pytest.mark.parametrize("algorithm", NAMES[1:])
def test_threads_and_repeats_agree(isa: str, threads: None, algorithm: str) -> None:
    """The sum of an element does not depend on how the work is cut over threads."""
    code, ran = NAMES.index(algorithm), 0
    for geometry in THREADED:
        for dtype in (F32, torch.bfloat16):
            if code not in geometry.algorithms(dtype == torch.bfloat16):
                continue
            case, results = make_case(geometry, dtype), []
            for count in (1, 2, 2, 3, 5):
                torch.set_num_threads(count)
                results.append(conv(case, case.inputs[0], code))
            for result in results[1:]:
                assert_exact(result, results[0])
            ran += 1
    assert ran


@pytest.mark.parametrize("algorithm", NAMES[1:])
def test_images_do_not_depend_on_the_batch(isa: str, algorithm: str) -> None:
    code, ran = NAMES.index(algorithm), 0
    for geometry in THREADED:
        if geometry.batch == 1 or code not in geometry.algorithms(False):
            continue
        case = make_case(geometry, F32)
        x = case.inputs[0]
        whole = conv(case, x, code)
        for begin, end in [(0, 1), (1, 2), (geometry.batch - 1, geometry.batch)]:
            assert_exact(conv(case, x[begin:end], code), whole[begin:end])
        ran += 1
    assert ran


def test_tiers_agree() -> None:
    """fp32 results differ between tiers by rounding only: FMA or not, and the order of sums."""
    for geometry in (GEOMETRIES[7], GEOMETRIES[10], GEOMETRIES[20]):
        case, results = make_case(geometry, F32), {}
        for name in available_isas():
            with force_isa(name):
                results[name] = case.run(DIRECT)
        for result in results.values():
            check_products(case, DIRECT, 0, result)
            scale = case.exact().abs().max()
            assert (result - results["scalar"]).abs().max() <= 700 * 2**-24 * scale


@pytest.mark.parametrize("isa", available_isas())
@pytest.mark.parametrize("groups", [1, 16])
def test_a_large_output_is_that_of_its_parts(isa: str, groups: int) -> None:
    """From 16 MiB on it is written past the caches."""
    torch.manual_seed(0)
    kernel = 1 if groups == 1 else 3
    x, b = channels_last(torch.randn(2, 16, 380, 380)), torch.randn(16)
    w = torch.randn(16, 16 // groups, kernel, kernel)
    with force_isa(isa):
        y, *parts = (
            ops.conv2d(part, w, b, padding=kernel // 2, groups=groups, algorithm="auto")
            for part in (x, x[:1], x[1:])
        )
    assert parts[0].numel() * 4 < 2**24 <= y.numel() * 4
    assert torch.equal(y, torch.cat(parts))
