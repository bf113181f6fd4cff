"""torch.nn's transformer layers and stacks on this library's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pybigmodel._torch_private import autocast_enabled
from pybigmodel.nn._masks import hides_the_future
from pybigmodel.nn.int8_linear import Int8Linear
from pybigmodel.nn.linear import Linear
from pybigmodel.nn.multihead_attention import MultiheadAttention
from pybigmodel.ops._common import Activation, Precision

ActivationFunction = str | Callable[[Tensor], Tensor]


class TransformerEncoderLayer(nn.TransformerEncoderLayer):
    """Drop-in for :class:`torch.nn.TransformerEncoderLayer`, in inference and in training.

    ``x = norm1(x + attention(x)); y = norm2(x + linear2(act(linear1(x))))``, with ``norm_first``
    ``x = x + attention(norm1(x)); y = x + linear2(act(linear1(norm2(x))))``. The attention is a
    :class:`pybigmodel.nn.MultiheadAttention`, the linear layers are :class:`pybigmodel.nn.Linear`.
    Where no gradient is wanted, a relu, gelu or silu and the sums are part of the products.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype: as torch's.
        precision: "fp32" or "bf16", of all products: see :class:`pybigmodel.nn.Linear`.

    Call it as torch's. torch has a faster path of its own in inference; this has one path.

    Raises:
        RuntimeError: as :class:`pybigmodel.nn.MultiheadAttention`.
    """

    def __init__(
        self,
        d_model: int,
        nhead: int,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: ActivationFunction = F.relu,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(
            d_model,
            nhead,
            dim_feedforward,
            dropout,
            activation,
            layer_norm_eps,
            batch_first,
            norm_first,
            bias,
            device,
            dtype,
        )
