"""conv and conv_packed: values, layouts, epilogues, tiers, threads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import (
    ACTIVATIONS,
    DEPTHWISE,
    DIRECT,
    DIRECT_ROWS,
    FLOATS,
    GEOMETRIES,
    NAMES,
    PLANES,
    WINOGRAD2,
    WINOGRAD4,
    Case,
    Geometry,
    channels_last,
    check_products,
    conv,
    image_layouts,
    kernel_of,
    make_case,
    same,
    torch_conv,
)
from torch import Tensor

from pybigmodel import _native, ops
from pybigmodel.ops._conv_geometry import Geometry as Described
from pybigmodel.ops._conv_geometry import exact_algorithm
from pybigmodel.reference import conv as reference
from pybigmodel.testing import assert_exact, assert_no_worse, available_isas, force_isa

CONV = {1: ops.conv1d, 2: ops.conv2d, 3: ops.conv3d}
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
            actual = CONV[geometry.axes](x, w, None, stride, 2, dilation, groups)
            assert actual.stride() == expected.stride()


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
            composed = CONV[geometry.axes](
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
    x, function = case.inputs[0], CONV[geometry.axes]
    for precision, name in enumerate(PRECISIONS):
        y = function(x, case.weight, case.bias, precision=name, **geometry.options)
        assert_exact(y, conv(case, x, 0, precision))
        first = function(x[0], case.weight, case.bias, precision=name, **geometry.options)
        assert_exact(first, conv(case, x[:1], 0, precision)[0])
        if name == "fp32":
            r = torch.randn_like(first)
            y = function(x[0], case.weight, case.bias, residual=r, **geometry.options)
            assert_exact(y, first + r)


def test_padding_in_words_and_numbers() -> None:
    x, w = torch.randn(2, 5, 9, 11), torch.randn(7, 5, 3, 4)
    for padding, dilation in [("valid", 1), ("same", 1), ("same", (2, 3)), (1, 1), ((1, 2), 1)]:
        theirs = F.pad  # torch warns of asymmetric 'same' padding, which is padded by hand here
        if padding == "same":
            d = (dilation,) * 2 if isinstance(dilation, int) else dilation
            total = [d[0] * 2, d[1] * 3]
            sides = [total[1] // 2, -(-total[1] // 2), total[0] // 2, -(-total[0] // 2)]
            expected = F.conv2d(theirs(x, sides), w, dilation=dilation)
            assert expected.shape[2:] == x.shape[2:]
        else:
            expected = F.conv2d(x, w, padding=padding, dilation=dilation)
        y = ops.conv2d(x, w, padding=padding, dilation=dilation)
        assert_no_worse(y, expected, expected.double(), floor_ulps=16)
    assert_exact(ops.conv2d(x, w, padding=[2]), ops.conv2d(x, w, padding=((2, 2), (2, 2))))
    assert_exact(ops.conv2d(x, w, stride=[2]), ops.conv2d(x, w, stride=(2, 2)))
    line, taps = torch.randn(2, 5, 9), torch.randn(7, 5, 4)
    padded = F.pad(line, (1, 3))
    assert_exact(ops.conv1d(line, taps, padding=((1, 3),)), ops.conv1d(padded, taps))


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


THREADED = [
    Geometry(1, (300, 70), (7, 7), (3, 3), padding=same(3, 3)),
    Geometry(2, (16, 40), (33, 31), (3, 3), padding=same(3, 3)),
    Geometry(9, (40, 20), (3, 3), (3, 3), padding=same(3, 3)),  # rows narrower than a tile
    Geometry(1, (3, 40), (35, 37), (7, 7), stride=(2, 2), padding=((3, 3), (3, 3))),
    Geometry(2, (70, 70), (19, 21), (3, 3), padding=same(3, 3), groups=70),
    Geometry(1, (32, 320), (40,), (5,), padding=same(5)),
    Geometry(2, (64, 96), (20, 20), (1, 1)),
    Geometry(2, (6, 16), (40, 41), (5, 5)),
]


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


# --- the choice of algorithm --------------------------------------------------------------------


def test_direct_is_the_exact_choice() -> None:
    """The rule in Python, which torch.compile can follow, is that of the library."""
    chosen = set()
    for geometry in [*GEOMETRIES, *THREADED]:
        stride, padding, dilation, groups = geometry.raw
        weight = list(geometry.weight_shape)
        for wider in (0, 100, 600):
            image = [1, geometry.channels[0], *(size + wider for size in geometry.size)]
            for bf16 in (False, True):
                for last in (False, True):
                    code = _native.conv_algorithm(
                        image, weight, stride, padding, dilation, groups, bf16, True, last
                    )
                    described = Described(
                        image[2:], weight, stride, padding, dilation, groups, bf16
                    )
                    assert code == exact_algorithm(described, last)
                    chosen.add(code)
    assert chosen == {DIRECT, DIRECT_ROWS, DEPTHWISE, PLANES}


def test_algorithm_by_name(isa: str) -> None:
    case = make_case(Geometry(1, (64, 64), (28, 28), (3, 3), padding=same(3, 3)), F32)
    x, w = case.inputs[0], case.weight
    kernels = {
        "auto": "conv_winograd4_f32",
        "direct": "conv_direct_f32",
        "winograd2": "conv_winograd2_f32",
        "winograd4": "conv_winograd4_f32",
    }
    for algorithm, kernel in kernels.items():
        y = ops.conv2d(x, w, padding=1, algorithm=algorithm)
        assert _native.last_kernel() == f"{kernel}.{isa}"
        assert_exact(y, conv(case, x, NAMES.index(algorithm)))
    ops.conv2d(x, w[:, :1], groups=64, algorithm="depthwise")
    assert _native.last_kernel() == f"conv_depthwise.{isa}"
    ops.conv2d(x, w[:, :1], groups=64, algorithm="direct")
    assert _native.last_kernel() == f"conv_depthwise.{isa}"


def test_conv_algorithm() -> None:
    def choose(*shape: int, **kwargs: Any) -> str:
        n, c, o, size, k = shape
        return ops.conv_algorithm((n, c, size, size), (o, c, k, k), padding=k // 2, **kwargs)

    assert choose(1, 64, 64, 56, 3) == "winograd4"
    assert choose(1, 64, 64, 56, 3, exact=True) == "direct"
    assert choose(1, 64, 64, 56, 3, precision="bf16") == "direct"
    assert choose(1, 64, 64, 56, 3, dtype=torch.bfloat16) == "direct"
    assert choose(1, 64, 64, 56, 3, stride=2) == "direct"
    assert choose(1, 3, 64, 224, 7, stride=2) == "direct_rows"
    assert choose(1, 256, 64, 56, 1) == "direct"
    assert choose(1, 6, 16, 12, 5) == "direct_rows"
    assert choose(1, 6, 16, 12, 5, channels_last=False) == "planes"
    assert ops.conv_algorithm((1, 32, 9, 9), (32, 1, 3, 3), groups=32) == "depthwise"
    for x, w, groups in [
        ((1, 3, 9), (4, 3, 3, 3), 1),
        ((3, 9), (4, 3), 1),
        ((1, 4, 9, 9), (4, 3, 3, 3), 1),
        ((1, 6, 9, 9), (4, 2, 3, 3), 3),
        ((1, 6, 9, 9), (4, 2, 3, 3), 0),
    ]:
        with pytest.raises(ValueError, match=r"conv_algorithm: .*, got"):
            ops.conv_algorithm(x, w, groups=groups)
    for options, said in [
        ({"stride": 0}, r"stride must be at least 1, got \(0, 0\)"),
        ({"dilation": (1, 0)}, r"dilation must be at least 1, got \(1, 0\)"),
        ({"padding": -1}, r"padding must be at least 0, got \(-1, -1, -1, -1\)"),
        ({"dilation": 5}, "the kernel reaches over 11 pixels of an input of 9"),
    ]:
        with pytest.raises(ValueError, match=f"conv_algorithm: {said}"):
            ops.conv_algorithm((1, 3, 9, 9), (4, 3, 3, 3), **options)
    for x, w in [
        ((1, 3, -9, 9), (4, 3, 3, 3)),
        ((1, 3, 9, 9), (4, 3, 0, 3)),
        ((-1, 3, 9), (4, 3, 3)),
    ]:
        with pytest.raises(ValueError, match=r"conv_algorithm: .* must have pixels and taps, got"):
            ops.conv_algorithm(x, w, padding=2)


# --- what is refused ----------------------------------------------------------------------------


def test_names_of_enums() -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3)
    packed = ops.pack_conv_weight(w, algorithm="direct")
    with pytest.raises(ValueError, match=r"activation must be one of .*leaky_relu; got 'swish'"):
        ops.conv2d(x, w, activation="swish")
    with pytest.raises(ValueError, match=r"activation must be one of .*leaky_relu; got \[\]"):
        ops.conv_packed(x, packed, 3, (3, 3), algorithm="direct", activation=[])
    with pytest.raises(ValueError, match=r"precision must be 'fp32' or 'bf16'; got 'tf32'"):
        ops.conv2d(x, w, precision="tf32")
    for algorithm in ("direct_rows", "winograd", "", [], None):
        with pytest.raises(ValueError, match=r"algorithm must be one of auto, direct, winograd2,"):
            ops.conv2d(x, w, algorithm=algorithm)
    for algorithm in ("auto", "winograd", [], None):
        with pytest.raises(ValueError, match=r"algorithm must be one of direct, direct_rows, "):
            ops.pack_conv_weight(w, algorithm=algorithm)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("stride", (1, 2, 3)),
        ("stride", ()),
        ("stride", 1.5),
        ("stride", (1, 1.0)),
        ("dilation", (1, 2, 3)),
        ("padding", (1, 2, 3)),
        ("padding", ((1, 2), (3, 4, 5))),
        ("padding", ((1, 2.0), (3, 4))),
        ("padding", "full"),
        ("padding", 0.5),
    ],
)
def test_geometries_of_another_form(name: str, value: Any) -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3)
    with pytest.raises(ValueError, match=rf"conv2d: {name} must be"):
        ops.conv2d(x, w, **{name: value})
    packed = ops.pack_conv_weight(w, algorithm="direct")
    with pytest.raises(ValueError, match=rf"conv_packed: {name} must be"):
        ops.conv_packed(x, packed, 3, (3, 3), algorithm="direct", **{name: value})


def test_same_takes_no_stride() -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3)
    with pytest.raises(ValueError, match=r"padding='same' takes a stride of 1, got \(1, 2\)"):
        ops.conv2d(x, w, padding="same", stride=(1, 2))


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_dimensions_of_the_input(axes: int) -> None:
    w = torch.randn(3, 4, *[3] * axes)
    for shape in ([4], [2, 4, *[5] * (axes - 1)][: axes + 0], [1, 2, 4, *[5] * axes]):
        with pytest.raises(RuntimeError, match=rf"conv{axes}d: input must have {axes + 1} or"):
            CONV[axes](torch.randn(shape), w)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("algorithm", ["auto", "direct", "winograd2"])
def test_what_no_algorithm_computes_is_named(algorithm: str, grad: bool) -> None:
    x, w = torch.randn(2, 4, 9, 9), torch.randn(3, 4, 3, 3)
    with torch.set_grad_enabled(grad):
        with pytest.raises(
            RuntimeError, match=r"conv: stride must be between 1 and .*, got \(0, 0\)"
        ):
            ops.conv2d(x, w, stride=0, algorithm=algorithm)
        for padding in (1, "same"):
            with pytest.raises(
                RuntimeError, match=r"conv2d: weight must have 4 dimensions, .*shape"
            ):
                ops.conv2d(x, w[0, 0], padding=padding, algorithm=algorithm)


def test_algorithms_that_do_not_compute_it() -> None:
    x, w = torch.randn(2, 16, 9, 9), torch.randn(16, 16, 3, 3)
    calls: list[dict[str, Any]] = [
        {"algorithm": "winograd2", "stride": 2},
        {"algorithm": "winograd4", "dilation": 2},
        {"algorithm": "winograd4", "precision": "bf16"},
        {"algorithm": "depthwise"},
    ]
    for options in calls:
        with pytest.raises(RuntimeError, match=r"conv: algorithm \d does not compute"):
            ops.conv2d(x, w, **options)
    with pytest.raises(RuntimeError, match=r"conv: algorithm 3 does not compute"):
        ops.conv2d(x, w[..., :2], algorithm="winograd2")
    with pytest.raises(
        RuntimeError, match=r"algorithm 4 takes no weight of shape \(16, 16, 3, 2\)"
    ):
        ops.pack_conv_weight(w[..., :2], algorithm="winograd4")


def test_the_residual_has_the_outputs_shape_and_dtype() -> None:
    x, w = torch.randn(2, 4, 5, 5), torch.randn(3, 4, 3, 3)
    for bad in (torch.randn(3, 3, 3), torch.randn(2, 3, 5, 5), torch.randn(2, 3, 3, 3).double()):
        with pytest.raises(RuntimeError, match=r"conv2d: residual must be float32 of the output's"):
            ops.conv2d(x, w, residual=bad)
    good = torch.randn(2, 3, 3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ops.conv2d(x, w, residual=good).dtype == torch.bfloat16


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


def test_images_and_filters_without_pixels_are_refused() -> None:
    x, w = torch.zeros(4, 3, 5, 0), torch.ones(16, 3, 3, 3)
    with pytest.raises(RuntimeError, match=r"conv: input must have pixels, got shape"):
        ops.conv2d(x, w, padding=2)
    with pytest.raises(RuntimeError, match=r"pack_conv_weight: weight must have taps"):
        ops.pack_conv_weight(torch.zeros(16, 3, 3, 0), algorithm="direct_rows")
