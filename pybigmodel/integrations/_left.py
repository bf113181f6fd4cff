"""What the integrations do not take, and why: logged once for each reason, counted always."""

from __future__ import annotations

import logging
from collections import Counter
from threading import Lock

import torch
from torch import Tensor

from pybigmodel._torch_private import at_trace_time, forward_ad, is_dual, traced_types
from pybigmodel.ops._attention_checks import MAX_HEAD_DIM
from pybigmodel.ops._checks import FLOAT_DTYPES, name_of

_log = logging.getLogger("pybigmodel")
_counts: Counter[str] = Counter()
_lock = Lock()

# Others may mean something else by their data, or be unknown to the ops.
_TYPES = (Tensor, torch.nn.Parameter, *traced_types)


def left_to_torch() -> dict[str, int]:
    """How many calls of attention were left to torch so far in this process, by reason.

    Compiled code counts when it is traced, not when it runs. The ``pybigmodel`` logger says each
    reason once, at level info.
    """
    with _lock:
        return dict(_counts)


@at_trace_time
def note(reason: str) -> None:
    with _lock:
        first = reason not in _counts
        _counts[reason] += 1
    if first:
        _log.info("attention left to torch: %s", reason)


def why_left(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float, grouped: bool
) -> str | None:
    """Why pybigmodel.ops.attention cannot stand for torch's here; None if it can.

    What torch itself refuses is left to it too, so that the error is the one that users know.
    """
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    return (
        _kind(tensors)
        or _dtypes(q, k, v, mask)
        or _shapes(q, k, v, grouped)
        or (None if mask is None else _mask_shape(mask, q, k))
        or (None if 0.0 <= dropout_p <= 1.0 else "dropout_p is not a probability")
    )


def _kind(tensors: tuple[Tensor, ...]) -> str | None:
    for tensor in tensors:
        if type(tensor) not in _TYPES:
            return f"a {type(tensor).__name__}"
        if not tensor.is_cpu:
            return f"device {tensor.device.type}"
        if tensor.layout is not torch.strided or tensor.is_nested:
            return f"a {'nested' if tensor.is_nested else tensor.layout} tensor"
    if forward_ad._current_level >= 0 and any(map(is_dual, tensors)):
        return "forward-mode differentiation"
    return None


def _dtypes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> str | None:
    dtype = q.dtype
    if dtype not in FLOAT_DTYPES:
        return f"dtype {name_of(dtype)}"
    if k.dtype != dtype or v.dtype != dtype:
        return "q, k and v of several dtypes"
    if mask is not None and mask.dtype not in (torch.bool, torch.float32, dtype):
        return f"attn_mask of dtype {name_of(mask.dtype)} beside {name_of(dtype)}"
    return None


def _shapes(q: Tensor, k: Tensor, v: Tensor, grouped: bool) -> str | None:
    if not q.dim() == k.dim() == v.dim() or q.dim() not in (3, 4):
        return f"q of {q.dim()} dimensions, k of {k.dim()}, v of {v.dim()}"
    *batch, heads, _, d = q.shape
    *k_batch, kv_heads, keys, k_d = k.shape
    *v_batch, v_heads, values, v_d = v.shape
    if not q.numel() or not k.numel() or not v.numel():
        return "an empty tensor"
    if d != k_d or keys != values:
        return "sizes of q, k and v that do not match"
    if not batch == k_batch == v_batch:
        return "batches that broadcast"
    if kv_heads != v_heads or (heads % kv_heads != 0 if grouped else heads != kv_heads):
        return "numbers of heads that broadcast or do not match"
    if d > MAX_HEAD_DIM or v_d > MAX_HEAD_DIM:
        return f"a head dimension above {MAX_HEAD_DIM}"
    return None


def _mask_shape(mask: Tensor, q: Tensor, k: Tensor) -> str | None:
    scores = (*q.shape[:-1], k.shape[-2])
    if not 2 <= mask.dim() <= len(scores):
        return f"attn_mask of {mask.dim()} dimensions"
    for size, full in zip(mask.shape, scores[-mask.dim() :], strict=True):
        if size not in (1, full):
            return "attn_mask of a shape that does not broadcast"
    return None
