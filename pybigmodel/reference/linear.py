"""Linear layers, exact and quantised, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATION_FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
}


def linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """``act(x·Wᵀ + b) + r`` in the tensors' own dtype; pass float64 for an oracle."""
    y = ACTIVATION_FUNCTIONS[activation](F.linear(input, weight, bias))
    return y if residual is None else y + residual


def quantize_per_token(input: Tensor, symmetric: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Integers, scales and zero points, one of the latter two per row of the last dimension.

    Symmetric: s = max|x|/127, q = round(x/s). Asymmetric, over the range that holds zero:
    s = (max − min)/255, z = round(−min/s), q = clamp(round(x/s) + z, 0, 255).
    A row of zeros has s = 1; a row with NaN or infinity has s = NaN and q = z = 0.
    """
    x = input.float()
    low = x.amin(-1).clamp(max=0) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    high = x.amax(-1).clamp(min=0) if x.shape[-1] else x.new_zeros(x.shape[:-1])
    finite = x.isfinite().all(-1)
    scale = torch.maximum(-low, high) / 127 if symmetric else high / 255 - low / 255
    tiny = torch.finfo(torch.float32).tiny
    scale = torch.where((low == 0) & (high == 0), 1.0, scale.clamp(min=tiny))
    inverse = (1 / scale).unsqueeze(-1)
    rounded = torch.where(finite.unsqueeze(-1), (x * inverse).round(), 0.0)
    scale = torch.where(finite, scale, torch.nan)
    if symmetric:
        return rounded.clamp(-127, 127).to(torch.int8), scale, torch.zeros_like(scale).int()
    zero = torch.where(finite, (-low * inverse.squeeze(-1)).round().clamp(max=255), 0.0)
    q = (rounded + zero.unsqueeze(-1)).clamp(0, 255)
    return q.to(torch.uint8), scale, zero.int()


def int8_linear(
    input: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "none",
    residual: Tensor | None = None,
    symmetric: bool = False,
) -> Tensor:
    """``act(s_row·s_col·Σ(q − z)·w + b) + r``, the integer sums exact; float64 out."""
    q, scale, zero = quantize_per_token(input, symmetric)
    sums = (q.double() - zero.double().unsqueeze(-1)) @ weight.double().t()
    y = sums * scale.double().unsqueeze(-1) * weight_scale.double()
    if bias is not None:
        y = y + bias.double()
    y = ACTIVATION_FUNCTIONS[activation](y)
    return y if residual is None else y + residual.double()
