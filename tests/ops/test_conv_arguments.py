"""What conv makes of its arguments: padding in words, the choice of algorithm, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conv_cases import (
    DEPTHWISE,
    DIRECT,
    DIRECT_ROWS,
    GEOMETRIES,
    NAMES,
    OURS,
    PLANES,
    THREADED,
    Geometry,
    conv,
    make_case,
    same,
)

from pybigmodel import _native, ops
from pybigmodel.ops._conv_geometry import Geometry as Described
from pybigmodel.ops._conv_geometry import exact_algorithm
from pybigmodel.testing import assert_exact, assert_no_worse

F32 = torch.float32


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
            OURS[axes](torch.randn(shape), w)


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


def test_images_and_filters_without_pixels_are_refused() -> None:
    x, w = torch.zeros(4, 3, 5, 0), torch.ones(16, 3, 3, 3)
    with pytest.raises(RuntimeError, match=r"conv: input must have pixels, got shape"):
        ops.conv2d(x, w, padding=2)
    with pytest.raises(RuntimeError, match=r"pack_conv_weight: weight must have taps"):
        ops.pack_conv_weight(torch.zeros(16, 3, 3, 0), algorithm="direct_rows")
