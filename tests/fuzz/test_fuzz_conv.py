"""Random convolutions: every tier, algorithm and layout against float64, forward and backward.

The tolerance is the worst case of the algorithm (terms · epsilon · Σ|x·w|; Winograd's own bound),
so that a failure is a wrong index and never bad luck.
"""

from __future__ import annotations

from typing import Any

import torch
from conv_cases import WINOGRAD2, WINOGRAD4, Geometry, winograd_bound
from hypothesis import assume, given
from hypothesis import strategies as st
from int8_conv_cases import Filters, image, within_rounding
from strategies import tensors
from torch import Tensor

from pybigmodel.reference import conv as reference
from pybigmodel.testing import available_isas, force_isa

pbm = torch.ops.pybigmodel
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])


@st.composite
def geometries(draw: st.DrawFn) -> Geometry:
    axes, groups = draw(st.integers(1, 3)), draw(st.sampled_from([1, 1, 1, 2, 3, 18]))
    each = st.integers(1, 2) if groups == 18 else st.integers(1, 40)
    per_axis = [st.integers(1, 12), st.integers(1, 4), st.integers(1, 3), st.integers(1, 3)]
    size, kernel, stride, dilation = (tuple(draw(s) for _ in range(axes)) for s in per_axis)
    if axes == 2 and draw(st.booleans()):
        kernel, stride, dilation = (3, 3), (1, 1), (1, 1)
    padding = tuple((draw(st.integers(0, 4)), draw(st.integers(0, 4))) for _ in range(axes))
    channels = (groups * draw(each), groups * draw(each))
    for s, k, d, (before, after) in zip(size, kernel, dilation, padding, strict=True):
        assume(s + before + after >= (k - 1) * d + 1)
    return Geometry(
        draw(st.integers(0, 3)), channels, size, kernel, stride, padding, dilation, groups
    )


def worst(geometry: Geometry, algorithm: int, x: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """How far from y a kernel may be."""
    dtype, o = x.dtype, geometry.options
    eps = torch.finfo(dtype).eps
    if algorithm in (WINOGRAD2, WINOGRAD4):
        sums = w.double().abs().flatten(1).sum(1).view(-1, *[1] * (x.dim() - 2))
        off = winograd_bound(algorithm) * x.double().abs().max() * sums
    else:
        sizes = reference.conv(x.double().abs(), w.double().abs(), **o)
        off = sizes * (w[0].numel() + 8) * 2.0**-23
    return off + eps * (y.abs() + off) + torch.finfo(dtype).smallest_normal


@given(st.data(), geometries(), DTYPES)
def test_conv(data: Any, geometry: Geometry, dtype: torch.dtype) -> None:
    shape = [geometry.batch, geometry.channels[0], *geometry.size]
    x = data.draw(tensors(shape, dtype))
    w = data.draw(tensors([*geometry.weight_shape], dtype))
    b = torch.randn(geometry.channels[1])
    y = reference.conv(x.double(), w.double(), b.double(), **geometry.options)
    for algorithm in (0, *geometry.algorithms(dtype == torch.bfloat16)):
        # What is chosen may be Winograd.
        bound = WINOGRAD4 if not algorithm and dtype != torch.bfloat16 else algorithm
        if bound == WINOGRAD4 and WINOGRAD4 not in geometry.algorithms(False):
            bound = algorithm
        if not x.numel():
            bound = 0
        limit = worst(geometry, bound, x, w, y)
        for isa in available_isas():
            with force_isa(isa):
                for last in (False, True):
                    got = pbm.conv(x, w, b, *geometry.raw, 0, algorithm, last)
                    assert got.shape == y.shape and got.dtype == dtype
                    assert ((got.double() - y).abs() <= limit).all(), (isa, algorithm, last)


@given(st.data(), geometries(), DTYPES)
def test_gradients(data: Any, geometry: Geometry, dtype: torch.dtype) -> None:
    x = data.draw(tensors([geometry.batch, geometry.channels[0], *geometry.size], dtype))
    w = data.draw(tensors([*geometry.weight_shape], dtype))
    wide = [t.double().requires_grad_() for t in (x, w)]
    y = reference.conv(*wide, **geometry.options)
    dy = data.draw(tensors([*y.shape], dtype))
    exact = torch.autograd.grad(y, wide, dy.double())
    sizes = torch.autograd.grad(
        reference.conv(
            *(positive := [t.abs().detach().requires_grad_() for t in wide]), **geometry.options
        ),
        positive,
        dy.double().abs(),
    )
    terms = (w.shape[0] * w[0, 0].numel(), y[:, 0].numel())
    for isa in available_isas():
        with force_isa(isa):
            for last in (False, True):
                got = pbm.conv_backward(dy, x, w, *geometry.raw, 0, 1, last, True, True, True)
                for g, e, s, n in zip(got, exact, sizes, terms, strict=False):
                    off = s * (n + 8) * 2.0**-23
                    limit = off + torch.finfo(dtype).eps * (e.abs() + off)
                    limit = limit + torch.finfo(dtype).smallest_normal
                    assert ((g.double() - e).abs() <= limit).all(), (isa, last)


@given(st.data(), geometries(), st.sampled_from([torch.float32, torch.bfloat16, torch.uint8]))
def test_int8(data: Any, geometry: Geometry, dtype: torch.dtype) -> None:
    """Integer sums are exact on every tier: what is after them rounds a few times."""
    filters, x = Filters(geometry), image(geometry, dtype)
    zero = data.draw(st.integers(0, 255))
    static = {"input_scale": data.draw(st.floats(1e-3, 1.0)), "input_zero_point": zero}
    options: dict[str, Any] = static if dtype == torch.uint8 or data.draw(st.booleans()) else {}
    bias = torch.randn(geometry.channels[1])
    exact = filters.exact(x, bias, **options)
    scale = float(exact.abs().amax()) / 100 + 1e-3 if exact.numel() else 1.0
    expected = (exact / scale + zero).clamp(0, 255)
    for isa in available_isas():
        with force_isa(isa):
            for last in (False, True):
                options["channels_last"] = last
                y = filters.run(x, bias, **options)
                assert y.shape == exact.shape
                codes = filters.run(x, bias, **options, output_scale=scale, output_zero_point=zero)
                if exact.numel():
                    within_rounding(y, exact)
                    assert ((codes.double() - expected).abs() <= 0.5 + 1e-3).all(), (isa, last)
