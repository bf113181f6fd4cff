"""The masks of torch.nn's attention layers, where True hides, as pybigmodel.ops.attention takes
them, where True shows."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pybigmodel.ops._checks import name_of


def check_mask(layer: str, name: str, mask: Tensor, shape: tuple[int, ...]) -> None:
    """Refuses in the layer's name what is not a mask of this shape."""
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise RuntimeError(
            f"pybigmodel.nn.{layer}: {name} must be bool or floating, got {name_of(mask.dtype)}"
        )
    if mask.shape != shape:
        raise RuntimeError(
            f"pybigmodel.nn.{layer}: {name} must have shape {shape}, got {tuple(mask.shape)}"
        )


def merged(
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    *,
    batch: int,
    heads: int,
    extra: int,
    dtype: torch.dtype,
) -> Tensor | None:
    """Both masks as one that broadcasts to (B, H, Sq, Sk + extra); nothing hides the extra keys."""
    masks = []
    if attn_mask is not None:
        by_head = attn_mask.dim() == 3
        masks.append(attn_mask.unflatten(0, (batch, heads)) if by_head else attn_mask)
    if key_padding_mask is not None:
        masks.append(key_padding_mask[:, None, None, :])
    if extra:
        masks = [F.pad(mask, (0, extra)) for mask in masks]
    if not masks:
        return None
    if all(mask.dtype == torch.bool for mask in masks):
        return ~(masks[0] if len(masks) == 1 else masks[0] | masks[1])
    added = [_added(mask, dtype) for mask in masks]
    return added[0] if len(added) == 1 else added[0] + added[1]


def _added(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, -torch.inf)
    return mask if mask.dtype == torch.float32 else mask.to(dtype)


def hides_the_future(mask: Tensor, queries: int) -> bool:
    """Whether the mask is the causal one of this size; within a graph, which cannot see, no."""
    if mask.shape != (queries, queries) or torch.compiler.is_compiling():
        return False
    hidden = torch.full_like(mask, True if mask.dtype == torch.bool else -torch.inf)
    return torch.equal(mask, hidden.triu(1))
