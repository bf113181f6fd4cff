"""pybigmodel's convolutions: prepacked, as its layers call them, and in training."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from conv_results import FORWARD_BACKWARD
from conv_shapes import Convolution
from torch import Tensor

from peers import Contender, Unavailable
from peers.torch_conv import conv_contender, dtype_of, training_contender
from pybigmodel import ops
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


def build(problem: Convolution, layout: torch.memory_format = torch.channels_last) -> Contender:
    if problem.op == FORWARD_BACKWARD:
        function = partial(ops.conv2d, **problem.geometry, precision=problem.precision)
        return training_contender(problem, function, layout)
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
