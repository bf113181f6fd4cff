"""The normalisation of inference, a factor and an offset for each channel, folded into weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from pybigmodel.nn._packing import ConvKey, pack_filters


@contextmanager
def outliving() -> Iterator[None]:
    """For copies that outlive this call: out of inference mode, since they are used in any."""
    with torch.inference_mode(False), torch.no_grad():
        yield


def packed_fold(sources: tuple[Any, ...], eps: float, key: ConvKey) -> tuple[Tensor, Tensor]:
    """Of the tensors that `fold` takes: the packed weight and the bias."""
    with outliving():
        weight, bias = fold(*sources, eps=eps)
        return pack_filters(weight, key), bias


def fold(
    weight: Tensor,
    bias: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """``W·s`` and ``β + (b − μ)·s`` with ``s = w/√(σ² + ε)``: in float64, each rounded once.

    The weight (or a vector of scales, one a channel) keeps its dtype, but float16, whose range a
    factor can leave, becomes float32; the bias is float32.
    """
    scale = (var.double() + eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma.double()
    offset = -mean.double() if bias is None else bias.double() - mean.double()
    offset = offset * scale
    if beta is not None:
        offset = offset + beta.double()
    dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    folded = weight.double() * scale.view(-1, *[1] * (weight.dim() - 1))
    return folded.to(dtype), offset.float()
