"""pybigmodel's convolutions: prepacked, as its layers call them, and in training."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from conv_results import INT8
from conv_shapes import Convolution
from conv_transpose_shapes import TransposedConvolution
from torch import Tensor

from peers import Contender, Errors, Unavailable
from peers.torch_conv import conv_contender, dtype_of, training_contender
from pybigmodel import ops
from pybigmodel.nn.int8_conv import quantiser
from pybigmodel.ops._conv_geometry import ALGORITHMS

_NO_ACTIVATION = 0


def _algorithm(problem: Convolution, exact: bool) -> Any:
    return ops.conv_algorithm(
        problem.input_shape,
        problem.weight_shape,
        **problem.geometry,
        dtype=dtype_of(problem),
        exact=exact,
    )


def _packed(problem: Convolution, algorithm: Any) -> Contender:
    data, dtype = problem.data, dtype_of(problem)
    bias = data.bias.to(dtype)
    packed = ops.pack_conv_weight(data.weight.to(dtype), groups=problem.groups, algorithm=algorithm)
    convolve = torch.ops.pybigmodel.conv_packed.default
    kernel, stride, dilation = ([value] * 2 for value in (problem.k, problem.s, 1))
    padding = [problem.padding] * 4  # before and after, axis by axis
    code = ALGORITHMS[algorithm]

    def call(x: Tensor) -> Tensor:
        y: Tensor = convolve(
            x,
            packed,
            problem.n,
            kernel,
            bias,
            None,
            stride,
            padding,
            dilation,
            problem.groups,
            _NO_ACTIVATION,
            0.0,
            code,
            True,
        )
        return y

    return conv_contender(problem, call, note=algorithm)


def _quantiser(tensor: Tensor) -> tuple[float, int]:
    """Of its very range: known beforehand, the best case."""
    return quantiser(float(tensor.min()), float(tensor.max()))


def _int8(problem: Convolution) -> tuple[Callable[..., Tensor], tuple[float, int]]:
    """The call, of an image and the output's scale and zero point, and the image's."""
    data = problem.data
    quantized, scale = ops.quantize_weight(data.weight)
    packed = ops.pack_int8_conv_weight(quantized, groups=problem.groups)
    convolve = torch.ops.pybigmodel.int8_conv.default
    window = [problem.k, problem.s, problem.padding, problem.padding, 1] * 2
    quantised = _quantiser(data.x)
    operands = (packed, scale, data.bias, None, window, problem.groups, _NO_ACTIVATION, 0.0)

    def call(x: Tensor, *output: float) -> Tensor:
        y: Tensor = convolve(x, *operands, *quantised, 0.0, 0, *output, True)
        return y

    return call, quantised


def _build_int8(problem: Convolution) -> Contender:
    """From and to fp32."""
    convolve, _ = _int8(problem)
    return conv_contender(problem, lambda x: convolve(x, 0.0, 0), precision="int8")


def build_bytes(problem: Convolution) -> Contender:
    """From and to uint8, as between the layers of a model."""
    convolve, (scale, zero) = _int8(problem)
    x = (problem.data.x / scale).round().add(zero).clamp(0, 255).to(torch.uint8)
    output = _quantiser(problem.data.exact)
    calls = [
        partial(convolve, x.clone().contiguous(memory_format=torch.channels_last), *output)
        for _ in range(problem.copies)
    ]

    def errors() -> Errors:
        return Errors.of([(calls[0]().double() - output[1]) * output[0]], [problem.data.exact])

    return Contender(calls, errors, "from and to uint8")


def build(problem: Convolution, layout: torch.memory_format = torch.channels_last) -> Contender:
    if problem.trains:
        function = partial(ops.conv2d, **problem.geometry, precision=problem.precision)
        return training_contender(problem, function, layout)
    if problem.op == INT8:
        return _build_int8(problem)
    return _packed(problem, _algorithm(problem, exact=False))


def build_contiguous(problem: Convolution) -> Contender:
    """In training, from and to torch's default layout."""
    return build(problem, torch.contiguous_format)


def build_exact(problem: Convolution) -> Contender:
    """Where the choice is Winograd, what the direct algorithm would take."""
    exact = _algorithm(problem, exact=True)
    if exact == _algorithm(problem, exact=False):
        raise Unavailable("the automatic choice is exact")
    return _packed(problem, exact)


def build_transposed(problem: TransposedConvolution) -> Contender:
    """As its layers do it: the weight is packed at each call."""
    function = partial(ops.conv_transpose2d, **problem.geometry, precision=problem.precision)
    if problem.trains:
        return training_contender(problem, function)
    data, dtype = problem.data, dtype_of(problem)
    call = partial(function, weight=data.weight.to(dtype), bias=data.bias.to(dtype))
    return conv_contender(problem, call)
