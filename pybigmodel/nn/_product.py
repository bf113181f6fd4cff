"""A layer's product with a Parameter: with its packed copy wherever one may stand for it."""

from __future__ import annotations

import torch
from torch import Tensor

from pybigmodel._torch_private import forward_ad
from pybigmodel.nn._packing import (
    cacheable,
    linear_as_packed,
    linear_cached,
    linear_under_autocast,
    moment,
    packed_rows,
    rows_of,
)
from pybigmodel.ops._checks import FLOAT_DTYPES, name_of
from pybigmodel.ops._common import (
    Activation,
    ForwardModeError,
    activation_code,
    has_width,
    no_kernel,
    refuse_forward_mode,
)
from pybigmodel.ops.linear import linear_from_packed
from pybigmodel.reference.linear import ACTIVATION_FUNCTIONS

_linear = torch.ops.pybigmodel.linear.default
_linear_packed = torch.ops.pybigmodel.linear_packed.default

Rows = tuple[int, int | None]
# By first row: `moment` of the weight when a gradient was last wanted.
Moments = dict[int, tuple[int, int]]


def product(
    layer: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    precision: int,
    moments: Moments,
    *,
    rows: Rows = (0, None),
    activation: Activation = "none",
) -> Tensor:
    """``act(x·Wᵀ + b)`` with these rows of a weight, in one pass where nothing is recorded.

    weight is a Parameter, or what stands in its place; bias is that of the rows; moments are the
    layer's own, one for each weight.
    """
    if is_traced(input):
        y = _traced(input, weight, bias, precision, rows)
        return activated(y, activation)
    if forward_ad._current_level >= 0:
        refuse_forward_mode(f"pybigmodel.nn.{layer}", input=input, weight=weight, bias=bias)
    try:
        if not cacheable(weight):
            y = _linear(input, _part(weight, rows), bias, precision)
        elif wants_gradient(input, weight, bias):
            y = _with_gradient(input, weight, bias, precision, moments, rows)
        elif torch.is_autocast_enabled("cpu"):
            y = linear_under_autocast(linear_as_packed, input, weight, bias, precision, *rows)
        elif input.dtype != weight.dtype or not has_width(input, weight.shape[1]):
            y = _linear(input, _part(weight, rows), bias, precision)  # which names the mismatch
        else:
            copy = packed_rows(weight, precision, *rows)
            n, code = rows_of(weight, *rows), activation_code(activation)
            in_one_pass: Tensor = _linear_packed(input, copy, n, bias, None, code)
            return in_one_pass
    except ForwardModeError:
        raise
    except NotImplementedError as error:
        raise no_kernel(layer, advice(layer), input=input, weight=weight, bias=bias) from error
    except RuntimeError as error:
        if weight.dtype in FLOAT_DTYPES:
            raise
        raise RuntimeError(
            f"pybigmodel.nn.{layer} does not compute in {name_of(weight.dtype)}; {advice(layer)}"
        ) from error
    return activated(y, activation)


def advice(layer: str) -> str:
    """Where there is no kernel."""
    return (
        f"use torch.nn.{layer} there (pbm.restore puts it back, and pbm.optimize leaves such "
        "layers as they are)"
    )


def is_traced(input: Tensor) -> bool:
    """Under torch.compile, export with or without Dynamo, or torch.fx, whose proxies know no
    dtype."""
    return torch.compiler.is_compiling() or isinstance(input, torch.fx.Proxy)


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def activated(y: Tensor, activation: Activation) -> Tensor:
    """What the ops for inference do to their accumulators, by torch's ops."""
    return y if activation == "none" else ACTIVATION_FUNCTIONS[activation](y)


def _part(weight: Tensor, rows: Rows) -> Tensor:
    return weight if rows == (0, None) else weight[slice(*rows)]


def _with_gradient(
    input: Tensor, weight: Tensor, bias: Tensor | None, precision: int, moments: Moments, rows: Rows
) -> Tensor:
    # In training a weight is used once between two steps, and packing it on the way is less work
    # than making a copy; one that is met again as it was is worth it.
    now = moment(weight)
    again = moments.get(rows[0]) == now
    moments[rows[0]] = now
    y: Tensor
    part = _part(weight, rows)
    if (
        again
        and not torch.is_autocast_enabled("cpu")
        and input.dtype == weight.dtype
        and has_width(input, weight.shape[1])
    ):
        copy = packed_rows(weight, precision, *rows)
        y = linear_from_packed(input, part, bias, precision, copy)
    else:
        y = _linear(input, part, bias, precision)
    return y


def _traced(
    input: Tensor, weight: Tensor, bias: Tensor | None, precision: int, rows: Rows
) -> Tensor:
    y: Tensor
    if (
        not torch.compiler.is_compiling()  # torch.fx
        or torch.compiler.is_exporting()
        or not isinstance(weight, torch.nn.Parameter)  # of torch.func, which may differentiate
        or wants_gradient(input, weight, bias)
        or (input.dtype != weight.dtype and not torch.is_autocast_enabled("cpu"))
    ):
        y = _linear(input, _part(weight, rows), bias, precision)
    else:
        y = linear_cached(input, weight, bias, precision, *rows)
    return y
