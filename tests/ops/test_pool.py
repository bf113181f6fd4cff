"""Pooling against torch's own in float64."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pybigmodel import _native, ops
from pybigmodel.reference import pool as expected
from pybigmodel.testing import assert_exact, force_isa

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
DTYPES = (*FLOATS, torch.uint8)
CHANNELS = (1, 3, 16, 17, 33, 64, 130, 300)


def made(dtype: torch.dtype, shape: tuple[int, ...], last: bool) -> Tensor:
    x = torch.randint(0, 256, shape) if dtype == torch.uint8 else torch.randn(shape)
    return x.to(dtype, memory_format=torch.channels_last if last else torch.contiguous_format)


def geometry(rng: random.Random) -> tuple[tuple[int, ...], list[Any]]:
    """A shape, and kernel, stride, padding and dilation that leave a pixel."""
    kernel = [rng.randint(1, 5) for _ in range(2)]
    dilation = [rng.choice((1, 1, 2, 3)) for _ in range(2)]
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, dilation, strict=True)]
    shape = (rng.randint(1, 3), rng.choice(CHANNELS), *(r + rng.randint(0, 15) for r in reach))
    stride, padding = (
        [rng.randint(1, 4) for _ in range(2)],
        [rng.randint(0, k // 2) for k in kernel],
    )
    return shape, [kernel, stride, padding, dilation]


def check_mean(y: Tensor, exact: Tensor, x: Tensor) -> None:
    """One rounding of a float32 sum: chains of at most some dozen terms."""
    rounding = torch.finfo(x.dtype).eps
    bound = exact.double().abs() * rounding + float(x.abs().max()) * 2e-6
    assert y.dtype == x.dtype and y.shape == exact.shape
    assert bool(((y.double() - exact.double()).abs() <= bound).all())


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maxima_are_exact(dtype: torch.dtype, isa: str) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        shape, how = geometry(rng)
        ceil_mode, last, given_last = (rng.random() < 0.5 for _ in range(3))
        x = made(dtype, shape, last)
        with force_isa(isa):
            y = ops.max_pool2d(x, *how, ceil_mode, channels_last=given_last)
            assert _native.last_kernel().endswith(f".{isa}")
        whole = expected.max_pool2d(x, *how, ceil_mode)
        if dtype == torch.uint8:  # of a window without a pixel the least there is
            whole = torch.where(torch.isneginf(_floats(x, how, ceil_mode)), 0, whole)
        assert_exact(y.contiguous(), whole)


def _floats(x: Tensor, how: list[Any], ceil_mode: bool) -> Tensor:
    return expected.max_pool2d(x.float(), *how, ceil_mode)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_means(dtype: torch.dtype, isa: str) -> None:
    for seed in range(30):
        rng = random.Random(seed)
        shape, (kernel, stride, padding, _) = geometry(rng)
        x = made(dtype, shape, rng.random() < 0.5)
        more = (rng.random() < 0.5, rng.random() < 0.5, rng.choice((None, None, 7, -2)))
        sizes = (rng.randint(1, shape[2] + 2), rng.choice((1, 1, 2, 5)))
        with force_isa(isa):
            y = ops.avg_pool2d(x, kernel, stride, padding, *more, channels_last=seed % 2 == 0)
            assert _native.last_kernel().endswith(f".{isa}")
            z = ops.adaptive_avg_pool2d(x, sizes)
        check_mean(y, expected.avg_pool2d(x, kernel, stride, padding, *more), x)
        check_mean(z, expected.adaptive_avg_pool2d(x, sizes), x)


@pytest.mark.parametrize("channels", [1000, 40])
@pytest.mark.parametrize("size", [(7, 7), (1, 9), (56, 56)], ids=str)
def test_the_mean_of_whole_channels(size: tuple[int, int], channels: int) -> None:
    x = made(torch.float32, (1, channels, *size), True) + 1
    check_mean(ops.adaptive_avg_pool2d(x, 1), expected.adaptive_avg_pool2d(x, 1), x)
    half = x.bfloat16()
    check_mean(ops.adaptive_avg_pool2d(half, 1), expected.adaptive_avg_pool2d(half, 1), half)


def test_the_result_does_not_depend_on_threads() -> None:
    x = made(torch.float32, (2, 70, 33, 31), True)
    calls: list[Callable[[], Tensor]] = [
        lambda: ops.max_pool2d(x, 3, 2, 1),
        lambda: ops.avg_pool2d(x, 3, 1, 1),
        lambda: ops.adaptive_avg_pool2d(x, 1),
    ]
    before = torch.get_num_threads()
    try:
        for call in calls:
            given = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                given.append(call())
            assert_exact(given[1], given[0])
            assert_exact(given[2], given[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("isa", _native.available_isas())
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_nan_stays_and_infinities_compare(dtype: torch.dtype, isa: str) -> None:
    """NaN of either sign, with any payload, before and after what it is compared with."""
    x = made(dtype, (2, 40, 9, 11), True)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    inf = int(torch.tensor(torch.inf, dtype=dtype).view(bits))
    payload = 0x7F if dtype == torch.bfloat16 else 0x3FF if dtype == torch.float16 else 0x7FFFFF
    for sign in (1.0, -1.0):
        one = torch.tensor(sign * torch.inf, dtype=dtype).view(bits)
        for rest in (1, payload // 2 + 1, payload):
            x[torch.rand(x.shape) < 0.004] = (one | rest).view(dtype)
    assert inf and bool(x.isnan().any())
    x[torch.rand(x.shape) < 0.05] = torch.inf
    x[torch.rand(x.shape) < 0.2] = -torch.inf
    x[:, :, :4, :4] = -torch.inf
    with force_isa(isa):
        for how in ((3, 2, 1), (2, 2, 0), (9, 1, 4)):
            y, exact = ops.max_pool2d(x, *how), expected.max_pool2d(x, *how)
            assert torch.equal(y.isnan(), exact.isnan())
            assert_exact(y.nan_to_num(nan=5.0), exact.nan_to_num(nan=5.0).contiguous())
        mean = ops.avg_pool2d(x, 3, 2, 1)
        assert torch.equal(mean.isnan(), expected.avg_pool2d(x, 3, 2, 1).isnan())


def test_layouts() -> None:
    x = made(torch.float32, (2, 8, 9, 9), True)
    for view in (x, x.contiguous(), x[:, ::2], x[:, :, ::2, 1:], x.transpose(2, 3), x[:, 3:4]):
        y = ops.max_pool2d(view, 3, 2, 1)
        assert_exact(y.contiguous(), expected.max_pool2d(view, 3, 2, 1))
        check_mean(ops.avg_pool2d(view, 2), expected.avg_pool2d(view, 2), view)
    assert ops.max_pool2d(x, 2).is_contiguous(memory_format=torch.channels_last)
    assert ops.max_pool2d(x.contiguous(), 2).is_contiguous()
    assert ops.max_pool2d(x, 2, channels_last=False).is_contiguous()
    assert_exact(ops.max_pool2d(x[0], 2), expected.max_pool2d(x[0], 2))


def test_empty_batches() -> None:
    x = torch.randn(0, 8, 9, 9)
    assert ops.max_pool2d(x, 3, 2, 1).shape == (0, 8, 5, 5)
    assert ops.avg_pool2d(x, 3).shape == (0, 8, 3, 3)
    assert ops.adaptive_avg_pool2d(x, (2, None)).shape == (0, 8, 2, 9)
    assert ops.max_pool2d(torch.randn(2, 0, 4, 4), 2).shape == (2, 0, 2, 2)


BAD: list[tuple[Callable[[Tensor], Any], type[Exception], str]] = [
    (lambda x: ops.max_pool2d(x.double(), 2), RuntimeError, "max_pool2d: input must be float32"),
    (lambda x: ops.avg_pool2d(x.byte(), 2), RuntimeError, "avg_pool2d: input must be float32"),
    (lambda x: ops.max_pool2d(x[0, 0], 2), RuntimeError, "max_pool2d: input must have 3 or 4 dim"),
    (lambda x: ops.max_pool2d(x[:, :, :0], 2), RuntimeError, "max_pool2d: input must have pixels"),
    (lambda x: ops.max_pool2d(x, 0), RuntimeError, "max_pool2d: kernel_size must be between 1"),
    (lambda x: ops.max_pool2d(x, 2, 0), RuntimeError, "max_pool2d: stride must be between 1"),
    (lambda x: ops.max_pool2d(x, 2, 1, -1), RuntimeError, "max_pool2d: padding must be between 0"),
    (lambda x: ops.max_pool2d(x, 2, 1, 2), RuntimeError, "padding must be at most half of kernel"),
    (lambda x: ops.max_pool2d(x, 2, 1, 0, 0), RuntimeError, "dilation must be between 1"),
    (
        lambda x: ops.max_pool2d(x, 10),
        RuntimeError,
        "max_pool2d: the kernel reaches over 10 pixels",
    ),
    (lambda x: ops.max_pool2d(x, (1, 2, 3)), ValueError, "max_pool2d: kernel_size must be an int"),
    (lambda x: ops.avg_pool2d(x, 2, divisor_override=0), ValueError, "divisor_override must not"),
    (lambda x: ops.adaptive_avg_pool2d(x, 0), RuntimeError, "output_size must be between 1"),
    (lambda x: ops.adaptive_avg_pool2d(x, (1,)), ValueError, "output_size must be an int or 2"),
    (
        lambda x: ops.max_pool2d(x.requires_grad_(), 2),
        RuntimeError,
        r"max_pool2d: input requires grad.*torch.nn.functional.max_pool2d is differentiable",
    ),
]


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("case", range(len(BAD)))
def test_refusals(case: int, device: str) -> None:
    call, kind, message = BAD[case]
    with pytest.raises(kind, match=message):
        call(torch.ones(1, 2, 5, 5, device=device))
