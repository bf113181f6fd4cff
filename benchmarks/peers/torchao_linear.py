"""torchao: int8 dynamic (per token × per channel) and int8 weight-only, eager and compiled."""

from __future__ import annotations

import logging
import warnings
from functools import partial
from typing import Any

import torch
from shapes import Product
from torch import nn

from peers import Contender, Unavailable
from peers.torch_compile import MAX_COMPILED_COPIES, freeze, linear_module

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    logging.getLogger("torchao").setLevel(logging.ERROR)  # CUDA extensions that it cannot load
    from torchao.quantization import (
        Int8DynamicActivationInt8WeightConfig,
        Int8WeightOnlyConfig,
        quantize_,
    )


def _quantized(problem: Product, config: Any) -> nn.Module:
    model = nn.Sequential(linear_module(problem, torch.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantize_(model, config)
    return model


def _eager(problem: Product, config: Any) -> Contender:
    x = problem.data.x
    modules = [_quantized(problem, config)[0] for _ in range(problem.copies)]
    return Contender.of_linear(problem, [partial(module, x) for module in modules])


def build_dynamic(problem: Product) -> Contender:
    return _eager(problem, Int8DynamicActivationInt8WeightConfig())


def build_weight_only(problem: Product) -> Contender:
    return _eager(problem, Int8WeightOnlyConfig())


def build_dynamic_compiled(problem: Product) -> Contender:
    if problem.copies > MAX_COMPILED_COPIES:
        raise Unavailable(f"one compilation per weight, and {problem.copies} are in rotation")
    x, config = problem.data.x, Int8DynamicActivationInt8WeightConfig()
    return Contender.of_linear(
        problem, [freeze(_quantized(problem, config), x) for _ in range(problem.copies)]
    )
