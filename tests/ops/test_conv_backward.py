"""Gradients of convolution: against float64 autograd under the policy, and through autograd."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conv_cases import (
    DIRECT,
    FLOATS,
    GEOMETRIES,
    NAMES,
    OURS,
    WINOGRAD2,
    WINOGRAD4,
    WINOGRAD_RELATIVE,
    Geometry,
    channels_last,
    image_layouts,
    make_case,
    same,
    torch_conv,
)
from torch import Tensor

from pybigmodel import _native, ops
from pybigmodel.reference import conv as reference
from pybigmodel.testing import assert_exact, assert_no_worse, measure_error

F32 = torch.float32
backward = torch.ops.pybigmodel.conv_backward


def gradients(f: Any, dy: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    return torch.autograd.grad(f(*leaves), leaves, dy)


def all_gradients(
    geometry: Geometry, dtype: torch.dtype, f: Any
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Ours, torch's in the dtype, and those of the reference in float64: of input, weight, bias,
    each of several inputs together."""
    case = make_case(geometry, dtype)
    b = torch.randn(geometry.channels[1]).to(dtype)
    shape = reference.conv(case.inputs[0], case.weight, **geometry.options).shape
    results: tuple[list[tuple[Tensor, ...]], ...] = ([], [], [])

    def exact(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return reference.conv(x, w, b, **geometry.options)

    def theirs(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return torch_conv(geometry, x, w, b)

    for x in case.inputs:
        tensors = (torch.randn(shape).to(dtype), x, case.weight, b)
        results[0].append(gradients(f, *tensors))
        results[1].append(gradients(theirs, *tensors))
        results[2].append(gradients(exact, *(t.double() for t in tensors)))
        for ours, reference64 in zip(results[0][-1], results[2][-1], strict=True):
            assert ours.shape == reference64.shape
    return tuple(  # type: ignore[return-value]
        [torch.cat([t.flatten() for t in each]) for each in zip(*result, strict=True)]
        for result in results
    )


def ulps(gradient: Tensor) -> float:
    """The floor of the policy: in a chain of up to 256 terms the worst of some ten thousand sums is
    off by 5 ulp of the largest and their root mean square by 2, where oneDNN adds up many short
    chains; and the error of a few sums says little."""
    return 6 if gradient.numel() > 64 else 8


@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_against_autograd(isa: str, dtype: torch.dtype, geometry: Geometry) -> None:
    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return OURS[geometry.axes](x, w, b, algorithm="direct", **geometry.options)

    for actual, other, exact in zip(*all_gradients(geometry, dtype, ours), strict=True):
        assert_no_worse(actual, other, exact, floor_ulps=ulps(actual))
    assert _native.last_kernel().endswith("." + isa)


@pytest.mark.parametrize("axes", [1, 2, 3])
def test_bf16_products(isa: str, axes: int) -> None:
    """precision="bf16" of wider tensors: at most the rounding of the operands."""
    for geometry in GEOMETRIES:
        if geometry.axes != axes:
            continue

        def ours(x: Tensor, w: Tensor, b: Tensor, g: Geometry = geometry) -> Tensor:
            return OURS[g.axes](x, w, b, precision="bf16", algorithm="direct", **g.options)

        actual, _, exact = all_gradients(geometry, F32, ours)
        for mine, reference64 in zip(actual, exact, strict=True):
            assert mine.dtype == F32
            assert measure_error(mine, reference64).frobenius <= 2.0**-8  # two operands, rounded


@pytest.mark.parametrize("algorithm", [WINOGRAD2, WINOGRAD4])
def test_gradients_of_winograd(isa: str, algorithm: int) -> None:
    """That of the input is a convolution, that of the weight a sum over tiles: by Winograd where
    that is expected to be faster."""
    for geometry in GEOMETRIES:
        if algorithm not in geometry.algorithms(False):
            continue

        def ours(x: Tensor, w: Tensor, b: Tensor, g: Geometry = geometry) -> Tensor:
            return OURS[g.axes](x, w, b, algorithm=NAMES[algorithm], **g.options)

        (*mine, db), (*_, their_db), (*exact, exact_db) = all_gradients(geometry, F32, ours)
        for gradient, reference64 in zip(mine, exact, strict=True):
            assert measure_error(gradient, reference64).frobenius <= WINOGRAD_RELATIVE[WINOGRAD4]
        assert_no_worse(db, their_db, exact_db, floor_ulps=ulps(db))


def test_exact_gradients_run_no_winograd(isa: str) -> None:
    x, w = torch.randn(1, 64, 28, 28, requires_grad=True), torch.randn(64, 64, 3, 3)
    kernels = {"auto": "conv_winograd4_f32", "direct": "conv_direct_f32"}
    for algorithm, kernel in kernels.items():
        ops.conv2d(x, w, padding=1, algorithm=algorithm).sum().backward()
        assert _native.last_kernel() == f"{kernel}.{isa}"


def test_what_is_not_needed() -> None:
    """Each combination of leaves: what is wanted is the same to the bit, what is not is None."""
    for geometry in (GEOMETRIES[5], GEOMETRIES[10], GEOMETRIES[20]):
        case = make_case(geometry, F32, bias=True)
        assert case.bias is not None
        tensors = (case.inputs[0], case.weight, case.bias)
        y = ops.conv2d(*tensors, **geometry.options)
        dy = torch.randn_like(y)
        whole = gradients(lambda *t: ops.conv2d(*t, **geometry.options), dy, *tensors)  # noqa: B023
        for mask in range(1, 8):
            needed = [bool(mask >> i & 1) for i in range(3)]
            leaves = [
                t.clone().requires_grad_(need) for t, need in zip(tensors, needed, strict=True)
            ]
            ops.conv2d(*leaves, **geometry.options).backward(dy)
            for leaf, need, expected in zip(leaves, needed, whole, strict=True):
                if need:
                    assert_exact(leaf.grad, expected)
                else:
                    assert leaf.grad is None


def test_what_is_kept() -> None:
    """Beside a frozen weight no image is kept, and beside an image without gradient no weight."""
    for frozen, kept in (("weight", 1), ("input", 0)):
        x, w = torch.randn(2, 16, 9, 9), torch.randn(20, 16, 3, 3)
        (x if frozen == "weight" else w).requires_grad_()
        saved: list[Tensor] = []

        def keep(t: Tensor, saved: list[Tensor] = saved) -> Tensor:
            saved.append(t)
            return t

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            ops.conv2d(x, w)
        assert [t.data_ptr() for t in saved] == [(x, w)[kept].data_ptr()]


LAYOUTS = [GEOMETRIES[i] for i in (5, 10, 11, 18, 20, 23, 24, 27)]


@pytest.mark.parametrize("geometry", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_strides(isa: str, dtype: torch.dtype, geometry: Geometry) -> None:
    """The layout of no argument changes one bit of the gradients; but for the bias', whose sum
    follows it, and the input's where that of the result decides between algorithms."""
    case = make_case(geometry, dtype)
    x, w = case.inputs[0], case.weight
    dy = torch.randn(reference.conv(x, w, **geometry.options).shape).to(dtype)
    axes = (0, *range(2, dy.dim()))
    their_db, exact_db = dy.float().sum(axes), dy.double().sum(axes)
    geometric = (*geometry.raw, 0, DIRECT if geometry.groups == 1 else 0)
    for last in (False, True):
        plain = backward(dy, x, w, *geometric, last, True, True, True)
        for (kind, dys), (_, xs), (_, ws) in zip(
            image_layouts(dy), image_layouts(x), image_layouts(w), strict=True
        ):
            for arguments in ((dys, x, w), (dy, xs, w), (dy, x, ws)):
                dx, dw, db = backward(*arguments, *geometric, last, True, True, True)
                assert_exact(dx, plain[0]), kind
                assert_exact(dw, plain[1]), kind
                assert_no_worse(db, their_db, exact_db, floor_ulps=ulps(db))


FEW = [  # channels in, whose taps of a row fill the lanes that they do not
    Geometry(3, (6, 16), (14, 14), (5, 5)),
    Geometry(2, (3, 20), (17, 19), (7, 7), stride=(2, 2), padding=same(7, 7)),
    Geometry(2, (15, 5), (9, 8), (3, 3), (1, 3), padding=((0, 2), (3, 1)), dilation=(2, 1)),
    Geometry(2, (2, 3), (6, 4), (2, 4), (3, 5), padding=((1, 1), (3, 3))),
    Geometry(2, (4, 8), (40,), (9,), (2,)),
]


@pytest.mark.parametrize("geometry", FEW, ids=str)
@pytest.mark.parametrize("dtype", [F32, torch.float16], ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_few_channels(isa: str, last: bool, dtype: torch.dtype, geometry: Geometry) -> None:
    """A row of taps, channels side by side, is what lanes are filled with: of the data gradient and
    of the weight's. A NaN reaches the pixels and the filter that it is seen by, no other."""
    case = make_case(geometry, dtype)
    x, w = case.inputs[0], case.weight

    def theirs(x: Tensor, w: Tensor) -> Tensor:
        return torch_conv(geometry, x, w, None)

    dy = torch.randn(theirs(x, w).shape).to(dtype)
    expected = gradients(theirs, dy, x, w)
    exact = gradients(theirs, *(t.double() for t in (dy, x, w)))
    arguments = (*geometry.raw, 0, 0, last, True, True, False)
    if last:
        x, dy = channels_last(x), channels_last(dy)
    clean = backward(dy, x, w, *arguments)
    for actual, other, reference64 in zip(clean[:2], expected, exact, strict=True):
        assert_no_worse(actual, other, reference64, floor_ulps=ulps(actual))
    backward(dy, x, w, *geometry.raw, 0, 0, last, True, False, False)
    assert _native.last_kernel() == f"conv_spread.{isa}"
    bad = dy.clone()
    bad[1, 2][(-1,) * geometry.axes] = torch.nan
    seen = gradients(theirs, bad.double().nan_to_num(1e6), x.double(), w.abs().double() + 1)
    clear = gradients(theirs, bad.double().nan_to_num(0), x.double(), w.abs().double() + 1)
    dx, dw, _ = backward(bad, x, w, *arguments)
    assert torch.equal(dx.isnan(), seen[0] != clear[0])
    assert_exact(dw[[n != 2 for n in range(len(w))]], clean[1][[n != 2 for n in range(len(w))]])
    assert dw[2].isnan().any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_planes_of_pixels(isa: str, dtype: torch.dtype) -> None:
    """Where pixels are the lanes of a weight gradient, an image whose channels are innermost is
    turned on the way, to the same bits; those of an image with gaps too."""
    x, w = torch.randn(5, 1, 28, 28).to(dtype), torch.randn(6, 1, 5, 5).to(dtype)
    wide = torch.randn(5, 28, 28, 9).to(dtype)
    arguments = ([1, 1], [2] * 4, [1, 1], 1, 0, 0, False, False, True, False)
    for dy in (wide[..., :6].movedim(-1, 1), wide[..., :6].contiguous().movedim(-1, 1)):
        _, turned, _ = backward(dy, x, w, *arguments)
        assert _native.last_kernel() == f"conv_planes_weight_gradient.{isa}"
        assert_exact(turned, backward(dy.contiguous(), x, w, *arguments)[1])


def test_layouts_of_the_gradients() -> None:
    """That of the input as the output's, that of the weight contiguous, the bias' in fp32."""
    x, w = torch.randn(2, 16, 9, 9), torch.randn(20, 16, 3, 3)
    for image in (x, channels_last(x)):
        leaves = [image.requires_grad_(), w.clone().requires_grad_()]
        y = ops.conv2d(*leaves)
        dx, dw = torch.autograd.grad(y, leaves, torch.randn(2, 20, 7, 7))
        assert dx.stride() == image.stride() and dw.is_contiguous()
        image.requires_grad_(False)


def test_expanded_gradient(isa: str) -> None:
    """y.sum().backward() hands over a gradient with strides of 0."""
    for geometry in LAYOUTS:
        case = make_case(geometry, F32)
        leaves = [t.clone().requires_grad_() for t in (case.inputs[0], case.weight)]
        y = OURS[geometry.axes](*leaves, **geometry.options)
        y.sum().backward()
        arguments = (*geometry.raw, 0, 0, False, True, True, False)
        expected = backward(torch.ones_like(y), *(t.detach() for t in leaves), *arguments)
        assert_exact(leaves[0].grad, expected[0])
        assert_exact(leaves[1].grad, expected[1])


@pytest.mark.parametrize("activation", ["none", "silu", "hardswish", "leaky_relu"])
def test_composed(isa: str, activation: str) -> None:
    """The fused-looking call under autograd, activation and residual included."""
    geometry = Geometry(2, (16, 20), (7, 8), (3, 3), padding=same(3, 3), stride=(2, 1))
    case = make_case(geometry, F32, bias=True)
    assert case.bias is not None
    y = ops.conv2d(case.inputs[0], case.weight, **geometry.options)
    r, dy = torch.randn_like(y), torch.randn_like(y)

    def run(f: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        def with_residual(x: Tensor, w: Tensor, b: Tensor, r: Tensor) -> Tensor:
            return f(x, w, b, residual=r, activation=activation, **geometry.options)  # type: ignore[no-any-return]

        tensors = (t.to(dtype) for t in (dy, case.inputs[0], case.weight, case.bias, r))
        return gradients(with_residual, *tensors)

    triples = (
        run(ops.conv2d, F32),
        run(reference.conv, F32),
        run(reference.conv, torch.float64),
    )
    for actual, other, exact in zip(*triples, strict=True):
        assert_no_worse(actual, other, exact, floor_ulps=ulps(actual))


@pytest.mark.parametrize("unbatched", [False, True])
def test_unbatched(unbatched: bool) -> None:
    x, w = torch.randn(1, 8, 9, 9), torch.randn(20, 8, 3, 3)
    dy = torch.randn(1, 20, 7, 7)
    dx, dw = gradients(ops.conv2d, dy, x, w)
    if unbatched:
        dx0, dw0 = gradients(ops.conv2d, dy[0], x[0], w)
        assert_exact(dx0, dx[0])
        assert_exact(dw0, dw)


@pytest.mark.parametrize(("n", "c", "o"), [(0, 5, 7), (2, 0, 7), (2, 5, 0), (0, 0, 0), (0, 20, 20)])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_empty(isa: str, dtype: torch.dtype, n: int, c: int, o: int) -> None:
    x, w, b = torch.randn(n, c, 5, 6).to(dtype), torch.randn(o, c, 3, 3).to(dtype), torch.randn(o)
    dy = torch.randn(n, o, 5, 6).to(dtype)
    for algorithm in ("auto", "direct"):
        dx, dw, db = gradients(
            lambda *t: ops.conv2d(*t, padding=1, algorithm=algorithm),  # noqa: B023
            *(dy, x, w, b.to(dtype)),
        )
        assert_exact(dx, torch.zeros_like(x))
        assert_exact(dw, torch.zeros_like(w))
        if n == 0:
            assert_exact(db, torch.zeros_like(b, dtype=dtype))
        else:
            assert_no_worse(db, dy.sum((0, 2, 3)), dy.double().sum((0, 2, 3)))


DETERMINED = [
    Geometry(3, (40, 70), (9, 8), (3, 3), padding=same(3, 3)),
    Geometry(9, (40, 20), (3, 3), (3, 3), padding=same(3, 3)),
    Geometry(64, (1, 6), (28, 28), (5, 5)),
    Geometry(64, (6, 16), (12, 12), (5, 5)),
    Geometry(2, (3, 40), (35, 37), (7, 7), stride=(2, 2), padding=((3, 3), (3, 3))),
    Geometry(2, (70, 70), (19, 21), (3, 3), padding=same(3, 3), stride=(2, 2), groups=70),
    Geometry(2, (48, 96), (20, 20), (1, 1), stride=(2, 2)),
    Geometry(5, (32, 48), (40,), (5,), padding=same(5), groups=2),
]


@pytest.mark.parametrize("geometry", DETERMINED, ids=str)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16], ids=str)
def test_threads_and_repeats_agree(
    isa: str, threads: None, dtype: torch.dtype, geometry: Geometry
) -> None:
    """Gradients repeat to the bit; but for the weight's of images of few channels, to which each
    thread adds its part, they do not depend on the number of threads either."""
    case = make_case(geometry, dtype)
    x, w = case.inputs[0], case.weight
    dy = torch.randn(torch_conv(geometry, x, w, None).shape).to(dtype)
    few = geometry.groups == 1 and geometry.channels[0] <= 16
    first: tuple[Tensor, ...] | None = None
    for count in (1, 2, 3, 5):
        torch.set_num_threads(count)
        got, again = (
            backward(dy, x, w, *geometry.raw, 0, 0, False, True, True, True) for _ in range(2)
        )
        first = got if first is None else first
        for i, (a, repeated, b) in enumerate(zip(got, again, first, strict=True)):
            assert_exact(repeated, a)
            if i != 1 or not few:
                assert_exact(a, b)


def test_bias_gradient_of_a_float32_bias() -> None:
    """A bias in fp32 beside bf16 tensors gets its gradient in fp32, not rounded on the way."""
    x, w = torch.randn(2, 8, 9, 9).bfloat16(), torch.randn(20, 8, 3, 3).bfloat16()
    b, dy = torch.randn(20, requires_grad=True), torch.randn(2, 20, 7, 7).bfloat16()
    ops.conv2d(x, w, b).backward(dy)
    assert b.grad is not None and b.grad.dtype == F32
    assert_no_worse(b.grad, dy.float().sum((0, 2, 3)), dy.double().sum((0, 2, 3)))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_is_not_finite(isa: str, bad: float) -> None:
    """In the gradient it reaches the pixels that its output sees and its channel's filter."""
    geometry = Geometry(2, (16, 18), (9, 10), (3, 3), padding=same(3, 3))
    case = make_case(geometry, F32)
    x, w = case.inputs[0], case.weight
    dy = torch.randn(2, 18, 9, 10)
    arguments = (*geometry.raw, 0, DIRECT, False, True, True, True)
    clean = backward(dy, x, w, *arguments)
    dy[1, 4, 3, 0] = bad
    dx, dw, db = backward(dy, x, w, *arguments)
    sees = torch.zeros(2, 16, 9, 10, dtype=torch.bool)
    sees[1, :, 2:5, :2] = True
    assert not dx[sees].isfinite().any()
    assert_exact(dx[~sees], clean[0][~sees])
    channel = torch.arange(18) == 4
    assert not db[channel].isfinite().any() and not dw[channel][:, :, 1, 1].isfinite().any()
    assert_exact(dw[~channel], clean[1][~channel])
    assert_exact(db[~channel], clean[2][~channel])


@pytest.mark.parametrize("channels", [3, 16])
def test_sums_over_a_long_row_are_cut(channels: int) -> None:
    """A single chain of so many terms would be off by a thousandth."""
    torch.manual_seed(0)
    x, dy = torch.rand(1, channels, 2**20), torch.rand(1, 16, 2**20)
    w = torch.zeros(16, channels, 1, requires_grad=True)
    (dw,) = torch.autograd.grad(ops.conv1d(x, w), w, dy)
    exact = dy[0].double() @ x[0].double().T
    assert (dw.squeeze(2) - exact).abs().max() < 1e-5 * exact.abs().max()
