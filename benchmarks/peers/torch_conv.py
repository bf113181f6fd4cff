"""torch's convolutions: eager in both layouts, oneDNN with the weight reordered, compiled."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from conv_problem import ConvProblem
from conv_shapes import Convolution
from torch import Tensor

from peers import Contender, Errors, Unavailable
from peers.images import image_contender
from peers.torch_compile import frozen
from peers.torch_eager import DTYPES
from peers.training import forward_backward

# A quantised op is compared with the fp32 layer that it replaces.
_QUANTIZED = {"int8": torch.float32}


def dtype_of(problem: ConvProblem) -> torch.dtype:
    return (DTYPES | _QUANTIZED)[problem.precision]


def conv_contender(
    problem: ConvProblem,
    call: Callable[[Tensor], Tensor],
    layout: torch.memory_format = torch.channels_last,
    **options: Any,
) -> Contender:
    """Of `call(x)` with each copy of x in the problem's dtype and this layout."""
    if problem.precision in _QUANTIZED:
        options.setdefault("precision", "fp32")
    return image_contender(problem, call, dtype_of(problem), layout, **options)


def training_contender(
    problem: ConvProblem,
    function: Callable[..., Tensor],
    layout: torch.memory_format = torch.channels_last,
    weight_layout: torch.memory_format = torch.contiguous_format,
) -> Contender:
    """Of `function(x, weight, bias)` with the backward pass, x and the output in this layout."""
    data, dtype = problem.data, dtype_of(problem)
    x, grad = (t.to(dtype).contiguous(memory_format=layout) for t in (data.x, data.grad))
    inputs = [data.weight.to(dtype).contiguous(memory_format=weight_layout), data.bias.to(dtype)]
    if problem.is_image:
        function = partial(function, x)
    else:
        inputs.insert(0, x)
    step = forward_backward(function, inputs, grad)
    return Contender([step], lambda: Errors.of(step(), data.exact_gradients))


def build(problem: ConvProblem, layout: torch.memory_format = torch.contiguous_format) -> Contender:
    """F.conv2d or F.conv_transpose2d, what a model calls today."""
    if problem.trains:
        return training_contender(problem, problem.function, layout, weight_layout=layout)
    data, dtype = problem.data, dtype_of(problem)
    weight = data.weight.to(dtype).contiguous(memory_format=layout)
    call = partial(problem.function, weight=weight, bias=data.bias.to(dtype))
    return conv_contender(problem, call, layout)


def build_channels_last(problem: ConvProblem) -> Contender:
    return build(problem, torch.channels_last)


def build_onednn(problem: Convolution) -> Contender:
    """With the weight reordered beforehand: what inductor's freezing emits."""
    if not torch.backends.mkldnn.is_available():
        raise Unavailable("this torch is built without oneDNN")
    data, dtype = problem.data, dtype_of(problem)
    # stride and padding as its two ops take them
    padding, stride, dilation = ([value] * 2 for value in (problem.padding, problem.s, 1))
    weight = data.weight.to(dtype).contiguous(memory_format=torch.channels_last)
    packed = torch.ops.mkldnn._reorder_convolution_weight(
        weight, padding, stride, dilation, problem.groups, list(problem.input_shape)
    )
    convolve = torch.ops.mkldnn._convolution_pointwise.default
    bias = data.bias.to(dtype)

    def call(x: Tensor) -> Tensor:
        y: Tensor = convolve(
            x, packed, bias, padding, stride, dilation, problem.groups, "none", [], ""
        )
        return y

    return conv_contender(problem, call)


def build_compiled(problem: ConvProblem) -> Contender:
    """Frozen, which packs the weight; several inputs in rotation share the compiled layer."""
    data, dtype = problem.data, dtype_of(problem)
    layer = problem.layer(problem.c, problem.n, problem.k, **problem.geometry, dtype=dtype)
    layer.load_state_dict({"weight": data.weight, "bias": data.bias})
    layer = layer.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    x = data.x.to(dtype).contiguous(memory_format=torch.channels_last)
    return conv_contender(problem, frozen(layer, x))
