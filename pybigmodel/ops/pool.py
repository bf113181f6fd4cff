"""Pooling of images: the greatest or the mean value of each window."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pybigmodel.ops import _checks as check
from pybigmodel.ops._common import refuse_derivative
from pybigmodel.ops._conv_checks import check_list
from pybigmodel.ops._conv_geometry import Ints, batched, is_channels_last, per_axis
from pybigmodel.ops._conv_kernels import image

_ops = torch.ops.pybigmodel
_max_pool2d_op = _ops.max_pool2d.default
_avg_pool2d_op = _ops.avg_pool2d.default
_adaptive_avg_pool2d_op = _ops.adaptive_avg_pool2d.default


def max_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    dilation: Ints = 1,
    ceil_mode: bool = False,
    *,
    channels_last: bool | None = None,
) -> Tensor:
    """The greatest value of each window; for inference.

    ::

        y[n, c, i] = max_t x[n, c, i·stride + t·dilation − padding]

    over the taps t that are in the image: padding never wins.

    Args:
        input: (N, C, H, W) or (C, H, W), float32, bfloat16, float16 or uint8. One in channels_last
            is read in place, another is converted once a call.
        kernel_size: an int, or one an axis; at least 1.
        stride: the same. None: kernel_size.
        padding: on both sides, an int or one an axis; at most half of kernel_size.
        dilation: an int, or one an axis; at least 1.
        ceil_mode: whether a last window that is partly outside counts, as torch has it.
        channels_last: the layout of the result; None: input's.

    Returns:
        (N, C, H', W') or (C, H', W'), input's dtype.

    Numerics: exact. A window with NaN gives NaN; one without a pixel, which dilation allows, −∞
    (0 of uint8).

    Raises:
        RuntimeError: a wrong dtype, shape or device, or a tensor that requires grad while gradients
            are recorded, naming the argument.
        ValueError: a geometry of another form.
    """
    op = "max_pool2d"
    refuse_derivative(op, input=input)
    how = _windows(op, kernel_size, stride, padding)
    spread = per_axis(op, "dilation", dilation, 2)
    x, last = _image(op, input, channels_last)
    y: Tensor = _max_pool2d_op(x, *how, spread, ceil_mode, last)
    return y if x is input else y.squeeze(0)


def avg_pool2d(
    input: Tensor,
    kernel_size: Ints,
    stride: Ints | None = None,
    padding: Ints = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    channels_last: bool | None = None,
) -> Tensor:
    """The mean of each window: ``y[n, c, i] = 1/d · Σ_t x[n, c, i·stride + t − padding]``, padding
    being 0; for inference.

    Args:
        input: as for :func:`max_pool2d`, without uint8.
        kernel_size, stride, padding, ceil_mode, channels_last: as for :func:`max_pool2d`.
        count_include_pad: whether d counts the window's pixels of padding.
        divisor_override: d; None: the number of pixels.

    Returns:
        (N, C, H', W') or (C, H', W'), input's dtype.

    Numerics: fp32 sums along the window's rows and then over them (or the other way around, where
    windows share pixels), in chains as long as the window's sides; one division and one rounding to
    input's dtype. Which order it is, depends on the shapes alone.

    Raises:
        RuntimeError, ValueError: as :func:`max_pool2d`; a divisor_override of 0.
    """
    op = "avg_pool2d"
    refuse_derivative(op, input=input)
    if divisor_override == 0:
        raise ValueError(f"{op}: divisor_override must not be 0")
    how = _windows(op, kernel_size, stride, padding)
    x, last = _image(op, input, channels_last)
    y: Tensor = _avg_pool2d_op(x, *how, ceil_mode, count_include_pad, divisor_override or 0, last)
    return y if x is input else y.squeeze(0)


def adaptive_avg_pool2d(
    input: Tensor,
    output_size: int | Sequence[int | None] | None,
    *,
    channels_last: bool | None = None,
) -> Tensor:
    """The means of windows of about equal size that cover the image; for inference.

    Window i of n begins at ⌊i·size/n⌋ and ends before ⌈(i + 1)·size/n⌉, so those of an uneven
    division overlap, as torch's do. Of ``output_size=1`` it is the mean of each channel; threads
    then share the channels.

    Args:
        input: as for :func:`avg_pool2d`.
        output_size: at least 1, an int or one an axis; None: the image's size.
        channels_last: the layout of the result; None: input's.

    Returns:
        (N, C, n, m) or (C, n, m), input's dtype.

    Numerics, Raises: as :func:`avg_pool2d`.
    """
    op = "adaptive_avg_pool2d"
    refuse_derivative(op, input=input)
    x, last = _image(op, input, channels_last)
    y: Tensor = _adaptive_avg_pool2d_op(x, _sizes(op, output_size, x), last)
    return y if x is input else y.squeeze(0)


def _windows(op: str, kernel_size: Ints, stride: Ints | None, padding: Ints) -> list[list[int]]:
    """Kernel, stride and padding."""
    kernel = per_axis(op, "kernel_size", kernel_size, 2)
    steps = kernel if stride is None else per_axis(op, "stride", stride, 2)
    return [kernel, steps, per_axis(op, "padding", padding, 2)]


def _sizes(op: str, output_size: int | Sequence[int | None] | None, image: Tensor) -> list[int]:
    pair = (
        [output_size] * 2
        if output_size is None or isinstance(output_size, int)
        else list(output_size)
    )
    if len(pair) != 2:
        raise ValueError(f"{op}: output_size must be an int or 2 of them, got {output_size!r}")
    return [
        have if want is None else want for want, have in zip(pair, image.shape[2:], strict=True)
    ]


def _image(op: str, input: Tensor, channels_last: bool | None) -> tuple[Tensor, bool]:
    """With its batch dimension, and the layout of the result."""
    x = input if batched(op, input, 2) else input.unsqueeze(0)
    return x, is_channels_last(x) if channels_last is None else channels_last


# --- fake kernels ---------------------------------------------------------------------------------


def _check_pooled(op: str, input: Tensor, *more: torch.dtype) -> None:
    names = "float32, bfloat16, float16 or uint8" if more else "float32, bfloat16 or float16"
    torch._check(
        input.dtype in (*check.FLOAT_DTYPES, *more),
        lambda: f"{op}: input must be {names}, got {check.name_of(input.dtype)}",
    )
    check.check_dim(op, "input", input, 4)
    for size in input.shape[2:]:
        torch._check(
            size > 0, lambda: f"{op}: input must have pixels, got shape {tuple(input.shape)}"
        )


def _pooled_sizes(
    op: str,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> list[int]:
    check_list(op, "kernel_size", kernel, 2, 1)
    check_list(op, "stride", stride, 2, 1)
    check_list(op, "padding", padding, 2, 0)
    check_list(op, "dilation", dilation, 2, 1)
    torch._check(
        all(pad <= k // 2 for pad, k in zip(padding, kernel, strict=True)),
        lambda: (
            f"{op}: padding must be at most half of kernel_size, got {tuple(padding)} and "
            f"{tuple(kernel)}"
        ),
    )
    axes = zip(input.shape[2:], kernel, stride, padding, dilation, strict=True)
    return [_count(op, input, *axis, ceil_mode) for axis in axes]


def _count(
    op: str, input: Tensor, size: int, k: int, step: int, pad: int, spread: int, ceil_mode: bool
) -> int:
    reach, padded = (k - 1) * spread + 1, size + 2 * pad
    room = padded - reach + (step - 1 if ceil_mode else 0)
    torch._check(
        room >= 0,
        lambda: (
            f"{op}: the kernel reaches over {reach} pixels of an input of {padded} with its "
            f"padding: nothing is left, input has shape {tuple(input.shape)}"
        ),
    )
    count = room // step + 1
    return count - 1 if ceil_mode and (count - 1) * step >= size + pad else count


@torch.library.register_fake("pybigmodel::max_pool2d")
def _max_pool2d_fake(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    channels_last: bool,
) -> Tensor:
    op = "max_pool2d"
    _check_pooled(op, input, torch.uint8)
    sizes = _pooled_sizes(op, input, kernel_size, stride, padding, dilation, ceil_mode)
    return image(input, (*input.shape[:2], *sizes), channels_last)


@torch.library.register_fake("pybigmodel::avg_pool2d")
def _avg_pool2d_fake(
    input: Tensor,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int,
    channels_last: bool,
) -> Tensor:
    op = "avg_pool2d"
    _check_pooled(op, input)
    sizes = _pooled_sizes(op, input, kernel_size, stride, padding, (1, 1), ceil_mode)
    return image(input, (*input.shape[:2], *sizes), channels_last)


@torch.library.register_fake("pybigmodel::adaptive_avg_pool2d")
def _adaptive_avg_pool2d_fake(
    input: Tensor, output_size: Sequence[int], channels_last: bool
) -> Tensor:
    op = "adaptive_avg_pool2d"
    _check_pooled(op, input)
    check_list(op, "output_size", output_size, 2, 1)
    return image(input, (*input.shape[:2], *output_size), channels_last)
