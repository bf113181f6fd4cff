"""Additive attention in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from pybigmodel.reference.attention import dropout_mask


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """``softmax(Σ_h v_h·tanh(query_h + key_h))·value`` and the logarithm of each row's sum.

    In the tensors' own dtype; pass float64 for an oracle. A row that sees no key is zeros, its lse
    −inf, and every gradient through it zero.
    """
    s = torch.tanh(query.unsqueeze(2) + key.unsqueeze(1)) @ v
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        s = s.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        s = s + attn_mask.to(s.dtype)
    empty = (s == -torch.inf).all(-1, keepdim=True)
    s = s.masked_fill(empty, 0)  # neither the softmax nor its gradient meets a row of −inf
    weights = s.softmax(-1).masked_fill(empty, 0)
    lse = s.logsumexp(-1).masked_fill(empty.squeeze(-1), -torch.inf)
    if dropout_p:
        keep = dropout_mask(dropout_seed, dropout_p, s.shape[0], 1, *s.shape[1:]).squeeze(1)
        factor = 1 / (1 - dropout_p) if dropout_p < 1 else 0.0
        weights = weights.masked_fill(~keep, 0) * factor
    return weights @ value, lse
