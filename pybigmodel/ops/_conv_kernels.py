"""What convolution's ops need in Python: fake kernels, autograd, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pybigmodel._torch_private import below_autograd, register_function
from pybigmodel.ops import _checks as check
from pybigmodel.ops._autocast import register_autocast
from pybigmodel.ops._common import ForwardModeError, once_differentiable
from pybigmodel.ops._conv_checks import (
    ALGORITHM_COUNT,
    check_algorithm,
    check_channels,
    check_conv_activation,
    check_dims,
    check_groups,
    check_output_like,
    check_transposed,
    check_transposed_output,
    check_weight,
    out_sizes,
    packed_sizes,
    transposed_sizes,
)
from pybigmodel.ops._conv_geometry import ALGORITHMS, Geometry, admits

_ops = torch.ops.pybigmodel

# --- fake kernels -------------------------------------------------------------------------------


def image(like: Tensor, shape: Sequence[int], channels_last: bool) -> Tensor:
    if not channels_last:
        return like.new_empty(shape)
    batch, channels, *sizes = shape
    return like.new_empty((batch, *sizes, channels)).movedim(-1, 1)


def _is_bf16(tensor: Tensor, precision: int) -> bool:
    return precision == 1 or tensor.dtype == torch.bfloat16


def _conv_shape(
    op: str,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: int,
    algorithm: int,
) -> tuple[int, ...]:
    """The output's, of arguments that are checked here."""
    check_weight(op, input, weight)
    sizes = out_sizes(op, input, weight.shape[2:], stride, padding, dilation)
    check_groups(op, groups, weight.shape[0])
    check_channels(op, input, groups, weight.shape[1])
    check.check_range(op, "precision", precision, 2)
    bf16 = _is_bf16(input, precision)
    geometry = (input.shape[2:], weight.shape, stride, padding, dilation, groups, bf16)
    check_algorithm(op, algorithm, Geometry(*geometry))
    return input.shape[0], weight.shape[0], *sizes


@torch.library.register_fake("pybigmodel::conv")
def _conv_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: int,
    algorithm: int,
    channels_last: bool,
) -> Tensor:
    op = "conv"
    geometry = (stride, padding, dilation, groups, precision, algorithm)
    shape = _conv_shape(op, input, weight, *geometry)
    check.check_bias(op, input, weight.shape[0], bias)
    return image(input, shape, channels_last)


@torch.library.register_fake("pybigmodel::pack_conv_weight")
def _pack_conv_weight_fake(weight: Tensor, groups: int, precision: int, algorithm: int) -> Tensor:
    op = "pack_conv_weight"
    check.check_float(op, "weight", weight)
    check_dims(op, "weight", weight, "(out_channels, in_channels of a group, kernel…)")
    check_groups(op, groups, weight.shape[0])
    torch._check(
        0 < algorithm < ALGORITHM_COUNT,
        lambda: f"{op}: algorithm must be in [1, {ALGORITHM_COUNT}), got {algorithm}",
    )
    check.check_range(op, "precision", precision, 2)
    bf16 = _is_bf16(weight, precision)
    ones = [1] * (weight.dim() - 2)
    geometry = Geometry(ones, weight.shape, ones, [0] * 6, ones, groups, bf16)
    torch._check(
        admits(geometry, algorithm),
        lambda: (
            f"{op}: algorithm {algorithm} takes no weight of shape {tuple(weight.shape)} with "
            f"groups = {groups} in this precision"
        ),
    )
    return weight.new_empty(
        packed_sizes(weight.shape, groups, bf16, algorithm),
        dtype=torch.bfloat16 if bf16 and algorithm != ALGORITHMS["depthwise"] else torch.float32,
    )


@torch.library.register_fake("pybigmodel::conv_packed")
def _conv_packed_fake(
    input: Tensor,
    packed_weight: Tensor,
    out_channels: int,
    kernel_size: Sequence[int],
    bias: Tensor | None,
    residual: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    activation: int,
    slope: float,
    algorithm: int,
    channels_last: bool,
) -> Tensor:
    op = "conv_packed"
    check.check_float(op, "input", input)
    check_dims(op, "input", input, "(N, C, spatial)")
    channels = input.shape[1]
    check_groups(op, groups, channels, "channels of input")
    torch._check(
        out_channels >= 0, lambda: f"{op}: out_channels must be at least 0, got {out_channels}"
    )
    sizes = out_sizes(op, input, kernel_size, stride, padding, dilation)
    check_groups(op, groups, out_channels)
    check.check_bias(op, input, out_channels, bias)
    check_conv_activation(op, activation)
    check.check_dtype(op, "packed_weight", packed_weight, torch.float32, torch.bfloat16)
    torch._check(
        algorithm > 0,
        lambda: (
            f"{op}: algorithm must be the one that packed_weight was packed for, got {algorithm}"
        ),
    )
    bf16 = packed_weight.dtype == torch.bfloat16
    weight = (out_channels, channels // groups, *kernel_size)
    geometry = (input.shape[2:], weight, stride, padding, dilation, groups, bf16)
    check_algorithm(op, algorithm, Geometry(*geometry))
    packed = packed_sizes(weight, groups, bf16, algorithm)
    why = (
        f"must be contiguous with shape {tuple(packed)}, as pack_conv_weight makes it for this "
        "convolution and algorithm"
    )
    check.check_shape(op, "packed_weight", packed_weight, packed, why)
    check.check_contiguous(op, "packed_weight", packed_weight)
    check.check_same_device(op, "packed_weight", packed_weight, input)
    shape = (input.shape[0], out_channels, *sizes)
    if residual is not None:
        check_output_like(op, "residual", residual, input, shape)
    return image(input, shape, channels_last)


HEAD = 10  # of a step of conv_sequence: the integers before its axes, as csrc/ops.cpp has them


@torch.library.register_fake("pybigmodel::conv_sequence")
def _conv_sequence_fake(
    tensors: list[Tensor], program: Sequence[int], slopes: Sequence[float], outputs: Sequence[int]
) -> list[Tensor]:
    places, at = list(tensors), 0
    for slope in slopes:
        input, weight, bias, residual, channels, groups, act, algorithm, last, axes = program[
            at : at + HEAD
        ]
        at += HEAD
        window = program[at : at + 5 * axes]
        at += 5 * axes
        padding = [side for i in range(axes) for side in window[5 * i + 2 : 5 * i + 4]]
        places.append(
            _conv_packed_fake(
                *(places[input], places[weight], channels, window[::5]),
                None if bias < 0 else places[bias],
                None if residual < 0 else places[residual],
                *(window[1::5], padding, window[4::5], groups, act, slope, algorithm, bool(last)),
            )
        )
    return [places[len(tensors) + step] for step in outputs]


@torch.library.register_fake("pybigmodel::conv_backward")
def _conv_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: int,
    algorithm: int,
    channels_last: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "conv_backward"
    geometry = (stride, padding, dilation, groups, precision, algorithm)
    shape = _conv_shape(op, input, weight, *geometry)
    check_output_like(op, "grad_output", grad_output, input, shape)
    n = weight.shape[0]
    return _gradients(input, weight, n, channels_last, need_input, need_weight, need_bias)


def _gradients(
    input: Tensor,
    weight: Tensor,
    n: int,
    channels_last: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    nothing = (0,)
    return (
        image(input, input.shape, channels_last) if need_input else input.new_empty(nothing),
        weight.new_empty(weight.shape if need_weight else nothing),
        input.new_empty((n,) if need_bias else nothing, dtype=torch.float32),
    )


@torch.library.register_fake("pybigmodel::conv_transpose")
def _conv_transpose_fake(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    output_padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: int,
    exact: bool,
    channels_last: bool,
) -> Tensor:
    op = "conv_transpose"
    check_transposed(op, input, weight, stride, padding, dilation, groups, precision)
    check.check_bias(op, input, weight.shape[1] * groups, bias)
    geometry = (stride, padding, output_padding, dilation)
    sizes = transposed_sizes(op, input, weight.shape[2:], *geometry)
    return image(input, (input.shape[0], weight.shape[1] * groups, *sizes), channels_last)


@torch.library.register_fake("pybigmodel::conv_transpose_backward")
def _conv_transpose_backward_fake(
    grad_output: Tensor,
    input: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    precision: int,
    exact: bool,
    channels_last: bool,
    need_input: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "conv_transpose_backward"
    check_transposed(op, input, weight, stride, padding, dilation, groups, precision)
    n = weight.shape[1] * groups
    check_transposed_output(op, grad_output, input, weight, stride, padding, dilation, groups)
    return _gradients(input, weight, n, channels_last, need_input, need_weight, need_bias)


# --- autograd -----------------------------------------------------------------------------------


def _stand_in(grad_output: Tensor, shape: Sequence[int]) -> Tensor:
    """For an operand that no gradient needs: the backward ops check its shape and do not read
    it."""
    return grad_output.new_empty(()).expand(shape)


def _differentiable(name: str, op: Any, gradient: Any) -> type[torch.autograd.Function]:
    """Of conv or conv_transpose; what its backward is told beside the tensors are the arguments
    after them, less output_padding."""
    transposed = name == "conv_transpose"

    class Convolution(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> Tensor:
            y: Tensor = below_autograd(op, *args)
            return y

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
            input, weight, bias, *options = inputs
            need_input, need_weight, *_ = ctx.needs_input_grad
            # Beside a frozen weight no image is kept, and beside the first image no weight.
            ctx.save_for_backward(input if need_weight else None, weight if need_input else None)
            ctx.shapes = input.shape, weight.shape
            ctx.bias_dtype = None if bias is None else bias.dtype
            ctx.options = [*options[:2], *options[3:]] if transposed else options

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            (grad_output,) = grads
            needed = ctx.needs_input_grad
            operands = (
                _stand_in(grad_output, shape) if kept is None else kept
                for kept, shape in zip(ctx.saved_tensors, ctx.shapes, strict=True)
            )
            grad_input, grad_weight, grad_bias = gradient(
                grad_output, *operands, *ctx.options, *needed[:3]
            )
            return (
                grad_input if needed[0] else None,
                grad_weight if needed[1] else None,
                grad_bias.to(ctx.bias_dtype) if needed[2] else None,
                *(None,) * (len(needed) - 3),
            )

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> None:
            raise ForwardModeError(f"{name}: forward-mode derivatives are not implemented")

    return Convolution


_library = torch.library.Library("pybigmodel", "IMPL")
for _name, _op, _gradient in (
    ("conv", _ops.conv.default, _ops.conv_backward.default),
    ("conv_transpose", _ops.conv_transpose.default, _ops.conv_transpose_backward.default),
):
    register_function(_library, _op, _differentiable(_name, _op, _gradient))
    register_function(_library, _gradient, once_differentiable(_gradient, _name))

# --- autocast: all but packed weights, whose dtype chooses the products --------------------------

register_autocast("conv", (0, 1, 2))
register_autocast("conv_packed", (0, 4, 5))
register_autocast("conv_transpose", (0, 1, 2))
