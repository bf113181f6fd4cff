"""The checks of convolution's fake kernels: what csrc/cpu/conv*.cpp refuse, in the same words."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from pybigmodel.ops import _checks as check
from pybigmodel.ops._common import CONV_ACTIVATIONS
from pybigmodel.ops._conv_geometry import ALGORITHMS, AUTO, WINOGRAD, Geometry, admits

INT32_MAX = 2**31 - 1  # of a stride and the like, so that no size overflows
ALGORITHM_COUNT = len(ALGORITHMS) + 1  # automatic is 0


def check_list(op: str, name: str, entries: Sequence[int], count: int, least: int) -> None:
    torch._check(
        len(entries) == count,
        lambda: f"{op}: {name} must have {count} entries, got {tuple(entries)}",
    )
    torch._check(
        all(least <= entry <= INT32_MAX for entry in entries),
        lambda: f"{op}: {name} must be between {least} and {INT32_MAX}, got {tuple(entries)}",
    )


def check_geometry(
    op: str,
    axes: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    check_list(op, "kernel_size", kernel, axes, 1)
    check_list(op, "stride", stride, axes, 1)
    check_list(op, "padding", padding, 2 * axes, 0)
    check_list(op, "dilation", dilation, axes, 1)


def check_dims(op: str, name: str, tensor: Tensor, what: str) -> None:
    torch._check(
        3 <= tensor.dim() <= 5,
        lambda: f"{op}: {name} must have 3, 4 or 5 dimensions {what}, got {tuple(tensor.shape)}",
    )


def check_groups(op: str, groups: int, channels: int, what: str = "output channels") -> None:
    torch._check(groups >= 1, lambda: f"{op}: groups must be at least 1, got {groups}")
    torch._check(
        channels % groups == 0,
        lambda: f"{op}: groups must divide the {channels} {what}, got {groups}",
    )


def out_sizes(
    op: str,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The spatial sizes of the output; there is at least a pixel."""
    check_geometry(op, input.dim() - 2, kernel, stride, padding, dilation)
    sizes = []
    for axis, size in enumerate(input.shape[2:]):
        padded = size + padding[2 * axis] + padding[2 * axis + 1]
        reach = (kernel[axis] - 1) * dilation[axis] + 1
        _check_reach(op, input, reach, padded)
        sizes.append((padded - reach) // stride[axis] + 1)
    return sizes


def _check_reach(op: str, input: Tensor, reach: int, padded: int) -> None:
    torch._check(
        padded >= reach,
        lambda: (
            f"{op}: the kernel reaches over {reach} pixels of an input of {padded} with its "
            f"padding: nothing is left, input has shape {tuple(input.shape)}"
        ),
    )


def check_channels(op: str, input: Tensor, groups: int, each: int) -> None:
    torch._check(
        input.shape[1] == groups * each,
        lambda: (
            f"{op}: input must have {groups * each} channels (groups = {groups} of {each}), got "
            f"shape {tuple(input.shape)}"
        ),
    )


def check_weight(op: str, input: Tensor, weight: Tensor) -> None:
    check.check_float(op, "input", input)
    check_dims(op, "input", input, "(N, C, spatial)")
    check.check_dtype(op, "weight", weight, input.dtype)
    check.check_same_device(op, "weight", weight, input)
    check.check_dim(op, "weight", weight, input.dim())


def check_algorithm(op: str, algorithm: int, geometry: Geometry) -> None:
    check.check_range(op, "algorithm", algorithm, ALGORITHM_COUNT)
    torch._check(
        algorithm == AUTO or admits(geometry, algorithm),
        lambda: (
            f"{op}: algorithm {algorithm} does not compute a convolution of this kernel, stride, "
            "dilation, groups and precision"
        ),
    )


def packed_sizes(weight: Sequence[int], groups: int, bf16: bool, algorithm: int) -> list[int]:
    """The shape of a packed weight (out_channels, in_channels / groups, kernel…)."""
    n, c, *kernel = weight
    panels, taps = groups * check.ceil_div(n // groups, check.PANEL), prod(kernel)
    if algorithm in WINOGRAD:
        places = 16 if algorithm == ALGORITHMS["winograd2"] else 36
        return [panels, places * c, check.PANEL]
    if algorithm == ALGORITHMS["depthwise"]:
        return [check.ceil_div(groups, check.PANEL), taps, check.PANEL]
    if algorithm == ALGORITHMS["planes"]:
        return [check.ceil_div(n, 8), c * taps, 8]
    run = kernel[-1] if algorithm == ALGORITHMS["direct_rows"] else 1
    per_lane = 2 if bf16 else 1
    lanes = check.ceil_div(run * c, per_lane)
    return [panels, taps // run * lanes, check.PANEL * per_lane]


def check_conv_activation(op: str, activation: int) -> None:
    check.check_range(op, "activation", activation, len(CONV_ACTIVATIONS))


def check_output_like(
    op: str, name: str, tensor: Tensor, input: Tensor, shape: Sequence[int]
) -> None:
    check.check_dtype(op, name, tensor, input.dtype)
    check.check_same_device(op, name, tensor, input)
    check.check_shape(op, name, tensor, shape, f"must have the output's shape {tuple(shape)}")


# --- transposed: a weight (in_channels, out_channels / groups, kernel…) ---------------------------


def check_transposed(
    op: str,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: int,
) -> None:
    check_weight(op, input, weight)
    torch._check(
        input.shape[1] == weight.shape[0],
        lambda: (
            f"{op}: input must have {weight.shape[0]} channels, as weight has filters, got shape "
            f"{tuple(input.shape)}"
        ),
    )
    check_geometry(op, input.dim() - 2, weight.shape[2:], stride, padding, dilation)
    check_groups(op, groups, weight.shape[0], "input channels")
    check.check_range(op, "precision", precision, 2)


def transposed_sizes(
    op: str,
    input: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
) -> list[int]:
    """The spatial sizes of the output; there is at least a pixel."""
    axes = input.dim() - 2
    torch._check(
        len(output_padding) == axes,
        lambda: f"{op}: output_padding must have {axes} entries, got {len(output_padding)}",
    )
    sizes = []
    for axis, size in enumerate(input.shape[2:]):
        step, more, spread = stride[axis], output_padding[axis], dilation[axis]
        _check_output_padding(op, more, step, spread)
        cut = padding[2 * axis] + padding[2 * axis + 1]
        sizes.append((size - 1) * step - cut + spread * (kernel[axis] - 1) + more + 1)
        _check_left(op, input, sizes[-1])
    return sizes


def _check_output_padding(op: str, more: int, stride: int, dilation: int) -> None:
    torch._check(
        more >= 0 and (more < stride or more < dilation),
        lambda: (
            f"{op}: output_padding must be at least 0 and less than stride or dilation, got {more} "
            f"beside stride {stride} and dilation {dilation}"
        ),
    )


def _check_left(op: str, input: Tensor, size: int) -> None:
    torch._check(
        size > 0,
        lambda: (
            f"{op}: padding leaves nothing of the output: its size would be {size}, input has "
            f"shape {tuple(input.shape)}"
        ),
    )


def check_transposed_output(
    op: str,
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> None:
    """Of any output_padding, which is not among the arguments of the backward op."""
    torch._check(
        grad_output.dim() == input.dim(),
        lambda: (
            f"{op}: grad_output must have as many dimensions as input (3, 4 or 5), got "
            f"{tuple(grad_output.shape)}"
        ),
    )
    channels = weight.shape[1] * groups
    shape = (input.shape[0], channels, *grad_output.shape[2:])
    check_output_like(op, "grad_output", grad_output, input, shape)
    for axis, size in enumerate(grad_output.shape[2:]):
        padded = size + padding[2 * axis] + padding[2 * axis + 1]
        reach = (weight.shape[axis + 2] - 1) * dilation[axis] + 1
        needed = (input.shape[axis + 2] - 1) * stride[axis] + reach
        _check_belongs(op, input, grad_output, padded >= needed)


def _check_belongs(op: str, input: Tensor, grad_output: Tensor, fits: bool) -> None:
    torch._check(
        fits,
        lambda: (
            f"{op}: input of shape {tuple(input.shape)} does not belong to grad_output of shape "
            f"{tuple(grad_output.shape)}"
        ),
    )
