"""Pooling in plain PyTorch: torch's own, in float64 and rounded once."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor


def max_pool2d(input: Tensor, *args: Any) -> Tensor:
    y: Tensor = F.max_pool2d(_exact(input), *args)
    return y.to(input.dtype)


def avg_pool2d(input: Tensor, *args: Any) -> Tensor:
    return F.avg_pool2d(_exact(input), *args).to(input.dtype)


def adaptive_avg_pool2d(input: Tensor, output_size: Any) -> Tensor:
    return F.adaptive_avg_pool2d(_exact(input), output_size).to(input.dtype)


def _exact(input: Tensor) -> Tensor:
    return input.double().contiguous()
