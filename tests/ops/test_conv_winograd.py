"""Winograd's convolutions: the bounds that they state, over magnitudes, offsets and depths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_cases import (
    GEOMETRIES,
    NAMES,
    WINOGRAD2,
    WINOGRAD4,
    WINOGRAD_RELATIVE,
    Geometry,
    channels_last,
    conv,
    kernel_of,
    make_case,
    same,
    winograd_bound,
)
from torch import Tensor

from pybigmodel import _native, ops
from pybigmodel.reference import conv as reference
from pybigmodel.testing import assert_exact, measure_error

F32 = torch.float32
TILE = {WINOGRAD2: 2, WINOGRAD4: 4}
ADMITTING = [g for g in GEOMETRIES if WINOGRAD2 in g.algorithms(False)]


def check_bound(algorithm: int, x: Tensor, w: Tensor, actual: Tensor, exact: Tensor) -> None:
    """|error| ≤ bound·max|x|·Σ|w|, the sum over the filter of the output channel; and the rounding
    to the tensors' dtype."""
    weights = w.double().abs().flatten(1).sum(1).view(-1, *[1] * (x.dim() - 2))
    rounding = exact.abs() * (torch.finfo(actual.dtype).eps if actual.dtype != F32 else 0)
    limit = winograd_bound(algorithm) * x.double().abs().max() * weights + rounding
    assert ((actual.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("geometry", ADMITTING, ids=str)
@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
@pytest.mark.parametrize("algorithm", [WINOGRAD2, WINOGRAD4])
def test_bound(isa: str, algorithm: int, dtype: torch.dtype, geometry: Geometry) -> None:
    case = make_case(geometry, dtype)
    for x in case.inputs:
        actual = conv(case, x, algorithm)
        assert _native.last_kernel() == kernel_of(geometry, algorithm, False, isa)
        exact = reference.conv(x.double(), case.weight.double(), **geometry.options)
        check_bound(algorithm, x, case.weight, actual, exact)
        assert_exact(conv(case, channels_last(x), algorithm, channels_last=True), actual)


WIDE = Geometry(1, (64, 48), (13, 14), (3, 3), padding=same(3, 3))
IMAGES: dict[str, Any] = {
    "normal": lambda x: x,
    "1e-30": lambda x: x * 1e-30,
    "1e30": lambda x: x * 1e30,
    "an offset of 100": lambda x: x + 100,
    "positive, as behind relu": lambda x: x.relu(),
    "an outlier": lambda x: x.index_fill(-1, torch.tensor([6]), 1e4),
    "alternating": lambda x: (-1.0) ** torch.arange(x.shape[-1]) * (1 + 0.01 * x),
    "falling by 1e6 from pixel to pixel": lambda x: x * 1e6 ** -torch.arange(x.shape[-1]).float(),
}


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("algorithm", [WINOGRAD2, WINOGRAD4])
def test_bound_over_magnitudes(isa: str, algorithm: int, image: str) -> None:
    case = make_case(WIDE, F32)
    x = IMAGES[image](case.inputs[0])
    exact = reference.conv(x.double(), case.weight.double(), **WIDE.options)
    check_bound(algorithm, x, case.weight, conv(case, x, algorithm), exact)


@pytest.mark.parametrize("channels", [1, 2, 16])
@pytest.mark.parametrize("algorithm", [WINOGRAD2, WINOGRAD4])
def test_bound_of_the_worst_images(isa: str, algorithm: int, channels: int) -> None:
    """Pixels of one magnitude and random signs, filters of one tap: 5e-7 and 2e-5 were found."""
    taps = torch.eye(9)[torch.randint(0, 9, (64, channels))].view(64, channels, 3, 3)
    x, w = torch.randn(2, channels, 32, 32).sign(), taps * torch.randn(64, channels, 1, 1)
    y = ops.conv2d(x, w, padding=1, algorithm=NAMES[algorithm])
    exact = torch.nn.functional.conv2d(x.double(), w.double(), padding=1)
    check_bound(algorithm, x, w, y, exact)


@pytest.mark.parametrize("channels", [16, 64, 256, 512])
@pytest.mark.parametrize("algorithm", [WINOGRAD2, WINOGRAD4])
def test_relative_error(isa: str, algorithm: int, channels: int) -> None:
    case = make_case(Geometry(1, (channels, 32), (12, 12), (3, 3), padding=same(3, 3)), F32)
    error = measure_error(case.run(algorithm), case.exact())
    assert error.frobenius <= WINOGRAD_RELATIVE[algorithm], error


@pytest.mark.parametrize("algorithm", [WINOGRAD2, WINOGRAD4])
def test_errors_add_up_over_layers(algorithm: int) -> None:
    """Sixteen layers with ReLU between them: the error grows as √layers, as that of any sum."""
    x, layers = torch.randn(1, 32, 16, 16), 16
    y, exact, errors = x, x.double(), []
    for _ in range(layers):
        w = torch.randn(32, 32, 3, 3) * (2 / 288) ** 0.5
        y = ops.conv2d(y, w, padding=1, activation="relu", algorithm=NAMES[algorithm])
        exact = torch.nn.functional.conv2d(exact, w.double(), padding=1).relu()
        errors.append(measure_error(y, exact).frobenius)
    assert errors[-1] <= 2 * layers**0.5 * WINOGRAD_RELATIVE[algorithm], errors


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("algorithm", [WINOGRAD2, WINOGRAD4])
def test_what_is_not_finite_spoils_tiles(isa: str, algorithm: int, bad: float) -> None:
    """The outputs of the tiles that see it, and no other; among them those that see it
    themselves."""
    case, m = make_case(WIDE, F32), TILE[algorithm]
    clean = conv(case, case.inputs[0], algorithm)
    for h, w in [(0, 0), (5, 8), (12, 13), (4, 3)]:
        x = case.inputs[0].clone()
        x[0, 7, h, w] = bad
        y = conv(case, x, algorithm)
        tiles = torch.zeros(13, 14, dtype=torch.bool)
        for top in range(0, 13, m):
            for left in range(0, 14, m):
                # A tile of outputs reads from one pixel before it to one after it.
                if top - 1 <= h <= top + m and left - 1 <= w <= left + m:
                    tiles[top : top + m, left : left + m] = True
        sees = torch.zeros_like(tiles)
        sees[max(h - 1, 0) : h + 2, max(w - 1, 0) : w + 2] = True
        assert not y[..., sees].isfinite().any()
        assert_exact(y[..., ~tiles], clean[..., ~tiles])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("algorithm", [WINOGRAD2, WINOGRAD4])
def test_a_bad_weight_spoils_its_channel_only(isa: str, algorithm: int, bad: float) -> None:
    case = make_case(WIDE, F32)
    clean = conv(case, case.inputs[0], algorithm)
    w = case.weight.clone()
    w[47, 3, 1, 2] = bad
    y = ops.conv2d(case.inputs[0], w, padding=1, algorithm=NAMES[algorithm])
    assert not y[:, 47].isfinite().any()
    assert_exact(y[:, :47], clean[:, :47])
