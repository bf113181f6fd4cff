"""torch.ao.quantization.quantize_dynamic: activations and weights per tensor (its default)."""

from __future__ import annotations

import warnings
from functools import partial

import torch
from shapes import Product
from torch import nn

from peers import Contender
from peers.torch_compile import linear_module


def build(problem: Product) -> Contender:
    x = problem.data.x
    modules = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces the removal of these modules at each use
        for _ in range(problem.copies):
            model = nn.Sequential(linear_module(problem, torch.float32))
            modules.append(
                torch.ao.quantization.quantize_dynamic(model, {nn.Linear}, dtype=torch.qint8)[0]
            )
    calls = [partial(module, x) for module in modules]
    return Contender.of_linear(problem, calls, note=f"engine {torch.backends.quantized.engine}")
