"""quantize_per_token, quantize_weight and pack_int8_linear_weight."""

from __future__ import annotations

import pytest
import torch
from linear_cases import FLOATS, layouts
from torch import Tensor

from pybigmodel import ops
from pybigmodel.reference import linear as reference
from pybigmodel.testing import assert_exact, available_isas, force_isa

SIZES = [1, 2, 15, 16, 17, 47, 48, 63, 64, 65, 127, 128, 255, 256, 257, 1000]


def special_rows(k: int, dtype: torch.dtype) -> Tensor:
    """Rows where the rule has its corners, among them: none, all alike, one sign, extremes."""
    big = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal / 64  # subnormal
    rows = [
        torch.zeros(k),
        torch.full((k,), -0.0),
        torch.ones(k),
        -torch.ones(k),
        torch.rand(k),
        -torch.rand(k),
        torch.randn(k) * 1e-30,
        torch.randn(k) * tiny,
        torch.tensor([big, -big]).repeat(k)[:k],
        torch.full((k,), 1 - 2**-24),
        torch.cat([torch.tensor([1e4]), torch.randn(k - 1)]),
    ]
    return torch.stack(rows).to(dtype)


@pytest.mark.parametrize("k", SIZES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_per_token(isa: str, dtype: torch.dtype, symmetric: bool, k: int) -> None:
    x = torch.cat([torch.randn(9, k).to(dtype), special_rows(k, dtype)])
    q, scale, zero = ops.quantize_per_token(x, symmetric)
    assert q.dtype == (torch.int8 if symmetric else torch.uint8)
    assert scale.dtype == torch.float32 and zero.dtype == torch.int32
    for actual, expected in zip(
        (q, scale, zero), reference.quantize_per_token(x, symmetric), strict=True
    ):
        assert_exact(actual, expected)
    # The bound of the docstring, with the rounding of 1/s and of the product.
    back = scale.double()[:, None] * (q.double() - zero[:, None])
    limit = scale.double()[:, None] * (0.501 if symmetric else 1.001)
    assert ((back - x.double()).abs() <= limit).all()
    if symmetric:
        assert (zero == 0).all() and (q.abs() <= 127).all()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nonfinite_row(isa: str, dtype: torch.dtype, bad: float, symmetric: bool) -> None:
    original = torch.randn(3, 70).to(dtype)
    clean = ops.quantize_per_token(original, symmetric)
    for at in (0, 15, 16, 63, 64, 69):
        x = original.clone()
        x[1, at] = bad
        q, scale, zero = ops.quantize_per_token(x, symmetric)
        assert scale[1].isnan() and (q[1] == 0).all() and zero[1] == 0
        for actual, expected in zip((q, scale, zero), clean, strict=True):
            assert_exact(actual[::2], expected[::2])


def test_tiers_agree_to_the_bit() -> None:
    x = torch.randn(40, 333) * torch.logspace(-20, 20, 40)[:, None]
    for symmetric in (False, True):
        results = []
        for name in available_isas():
            with force_isa(name):
                results.append(ops.quantize_per_token(x, symmetric))
        for other in results[1:]:
            for actual, expected in zip(other, results[0], strict=True):
                assert_exact(actual, expected)


@pytest.mark.parametrize("symmetric", [False, True])
def test_shapes_strides_threads(isa: str, threads: None, symmetric: bool) -> None:
    for lead in [(), (0,), (3,), (2, 0), (2, 3, 1, 2)]:
        for k in (0, 1, 20):
            x = torch.randn(*lead, k)
            got = ops.quantize_per_token(x, symmetric)
            assert got[0].shape == x.shape and got[1].shape == lead == got[2].shape
            for a, b in zip(got, reference.quantize_per_token(x, symmetric), strict=True):
                assert_exact(a, b)
    x = torch.randn(3, 400, 100)
    expected = ops.quantize_per_token(x, symmetric)
    for _, view in layouts(x):
        for count in (1, 2):
            torch.set_num_threads(count)
            for a, b in zip(ops.quantize_per_token(view, symmetric), expected, strict=True):
                assert_exact(a, b)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quantize_weight(isa: str, dtype: torch.dtype) -> None:
    w = torch.randn(33, 70).to(dtype)
    w[3] = 0
    q, scale = ops.quantize_weight(w)
    assert q.shape == (33, 70) and q.dtype == torch.int8 and scale.shape == (33,)
    assert (
        (scale[:, None].double() * q - w.double()).abs() <= 0.501 * scale[:, None].double()
    ).all()
    assert scale[3] == 1 and (q[3] == 0).all()
    assert_exact(ops.quantize_weight(w.t().contiguous().t())[0], q)
    assert not ops.quantize_weight(w.float().requires_grad_())[1].requires_grad


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_quantize_weight_refuses_nonfinite(bad: float) -> None:
    w = torch.randn(5, 8)
    w[2, 3] = w[4, 0] = bad
    message = r"quantize_weight: weight has NaN or infinity in 2 of its rows.* row 2"
    with pytest.raises(ValueError, match=message):
        ops.quantize_weight(w)


@pytest.mark.parametrize(
    "shape", [(1, 1), (15, 3), (17, 5), (48, 64), (33, 257), (0, 8), (5, 0)], ids=str
)
def test_packed_layout(isa: str, shape: tuple[int, int]) -> None:
    weight = torch.randint(-128, 128, shape, dtype=torch.int8)
    n, k = shape
    panels, groups = -(-n // 16), -(-k // 4)
    padded = torch.zeros(panels * 16, groups * 4, dtype=torch.int8)
    padded[:n, :k] = weight
    values = padded.view(panels, 16, groups, 4).transpose(1, 2).reshape(panels, groups, 64)
    sums = padded.int().sum(1, dtype=torch.int32).view(panels, 1, 16).view(torch.int8)
    expected = torch.cat([values, sums.view(panels, 1, 64)], 1)
    for _, w in layouts(weight) if 0 not in shape else [("", weight)]:
        assert_exact(ops.pack_int8_linear_weight(w), expected)
