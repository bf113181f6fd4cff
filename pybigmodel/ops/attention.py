"""Scaled dot-product attention with everything that the flash kernels offer."""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from pybigmodel._torch_private import forward_ad
from pybigmodel.ops import _attention_kernels  # noqa: F401  (registers what the ops need in Python)
from pybigmodel.ops._common import Precision, precision_code, refuse_forward_mode

Align: TypeAlias = Literal["bottom_right", "top_left"]
Window: TypeAlias = "tuple[int | None, int | None] | None"

_attention = torch.ops.pybigmodel.attention.default
_attention_varlen = torch.ops.pybigmodel.attention_varlen.default


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    causal: bool = False,
    window: Window = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    causal_align: Align = "bottom_right",
    precision: Precision | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Scaled dot-product attention in O(S) memory; differentiable.

    With off = Sk − Sq (0 for ``causal_align="top_left"``, the alignment of torch's ``is_causal``)::

        s_ij = scale·q_i·k_j
        s_ij = softcap·tanh(s_ij/softcap)           if softcap > 0
        s_ij = s_ij + attn_mask_ij                  a floating one; hidden where a bool is False
        s_ij = s_ij − slope_h·|i + off − j|         ALiBi
        hidden: j > i + off if causal;  j < i + off − left or j > i + off + right by window
        out_i = Σ_j softmax_j(s_ij)·m_ij·v_j,  lse_i = ln Σ_j exp(s_ij)

    m_ij is 1, or under dropout 0 with probability ``dropout_p`` and 1/(1 − dropout_p) otherwise. A
    query to which every key is hidden gives zeros and an lse of −∞.

    Args:
        q: (B, Hq, Sq, D), float32, bfloat16 or float16; a (B, S, H, D) tensor seen through
            ``transpose(1, 2)`` is read in place, as is any other with a contiguous last dimension.
        k, v: (B, Hkv, Sk, D) and (B, Hkv, Sk, Dv), q's dtype; Hq is a multiple of Hkv, and query
            head h reads head h // (Hq/Hkv). D and Dv are 1 to 256.
        attn_mask: bool, float32 or q's dtype, broadcastable to (B, Hq, Sq, Sk). Tiles that it hides
            whole at either end of a row's keys are skipped.
        causal: hide later keys.
        window: (left, right) neighbours that stay visible; None (or −1) is unbounded.
        alibi_slopes: float32, (Hq,) or (B, Hq); has no gradient.
        dropout_seed: an int, or an int64 tensor of one element; None draws one from torch's default
            generator. Element (b, h, i, j) is kept if the upper 24 bits of word j mod 4 of
            Philox4x32-10, counter (j // 4, i, b·Hq + h, 0) and key dropout_seed, are at least
            dropout_p·2²⁴: the same elements in forward, in backward and on every device.
        softcap: 0 or 1e-30 to 1e30.
        scale: default 1/√D; −1e38 to 1e38.
        return_lse: also return lse, (B, Hq, Sq) float32.
        precision: "bf16" computes float32 and float16 tensors in bfloat16 products. By default, and
            with "fp32", their products are float32 ones. Those of bfloat16 tensors are bfloat16
            ones whatever precision is: they are exact before they are summed.

    Returns:
        (B, Hq, Sq, Dv), q's dtype; in memory (B, Sq, Hq, Dv), as torch's SDPA has it, so that
        joining the heads copies nothing. With ``return_lse`` a pair.

    Numerics: products are summed and the softmax is kept in float32 (probabilities are rounded to
    bfloat16 for bfloat16 products); 2^x has a relative error below 2e-7 (3e-6 before rounding to
    bfloat16). A row's result depends neither on its neighbours in the batch nor on the number of
    threads; gradients are deterministic for a given number of threads.

    Raises:
        RuntimeError: a wrong dtype, shape, device or value, naming the argument; a second
            derivative.
        NotImplementedError: a forward-mode derivative.
        ValueError: a wrong window, alignment or precision.

    Source: Dao et al., "FlashAttention", 2022; "FlashAttention-2", 2023.
    """
    if forward_ad._current_level >= 0:
        refuse_forward_mode("attention", q=q, k=k, v=v, attn_mask=attn_mask)
    options = _options(
        "attention",
        q,
        causal,
        window,
        alibi_slopes,
        softcap,
        dropout_p,
        dropout_seed,
        scale,
        causal_align,
        precision,
    )
    out, lse, _ = _attention(q, k, v, attn_mask, *options, False)
    return (out, lse) if return_lse else out


def attention_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *,
    causal: bool = False,
    window: Window = None,
    alibi_slopes: Tensor | None = None,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    causal_align: Align = "bottom_right",
    precision: Precision | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """:func:`attention` over sequences that lie end to end, without padding; differentiable.

    Sequence b has the queries ``cu_seqlens_q[b]`` to ``cu_seqlens_q[b + 1] − 1`` and likewise its
    keys; none sees another's. In the formulas i, j and off count within the sequence.

    Args:
        q: (Tq, Hq, D).
        k, v: (Tk, Hkv, D) and (Tk, Hkv, Dv).
        cu_seqlens_q, cu_seqlens_k: (sequences + 1,) int32 or int64, rising from 0 to Tq and Tk.
        alibi_slopes: (Hq,) or (sequences, Hq).

    The others as for :func:`attention`.

    Returns:
        (Tq, Hq, Dv), q's dtype; with ``return_lse`` also lse, (Hq, Tq) float32.

    Raises:
        As :func:`attention`.
    """
    if forward_ad._current_level >= 0:
        refuse_forward_mode("attention_varlen", q=q, k=k, v=v)
    options = _options(
        "attention_varlen",
        q,
        causal,
        window,
        alibi_slopes,
        softcap,
        dropout_p,
        dropout_seed,
        scale,
        causal_align,
        precision,
    )
    out, lse, _ = _attention_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *options)
    return (out, lse) if return_lse else out


def _options(
    op: str,
    q: Tensor,
    causal: bool,
    window: Window,
    alibi_slopes: Tensor | None,
    softcap: float,
    dropout_p: float,
    dropout_seed: int | Tensor | None,
    scale: float | None,
    causal_align: Align,
    precision: Precision | None,
) -> tuple[Any, ...]:
    """The arguments that the two ops have in common, in their order."""
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: alibi_slopes requires grad, and it has no gradient: detach it")
    left, right = window_sides(window)
    if causal:
        right = 0
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    seed = seed_of(dropout_p, dropout_seed)
    bottom_right = _is_bottom_right(causal_align)
    code = 0 if precision is None else precision_code(precision)
    return alibi_slopes, seed, left, right, bottom_right, softcap, dropout_p, scale, code


def seed_of(dropout_p: float, dropout_seed: int | Tensor | None) -> Tensor | None:
    """As the ops take it, on the CPU; None: drawn from torch's default generator."""
    if dropout_p == 0:
        return None
    if dropout_seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64, device="cpu")
    if isinstance(dropout_seed, Tensor):
        return dropout_seed
    if not isinstance(dropout_seed, int) or not -(2**63) <= dropout_seed < 2**63:
        raise ValueError(
            "dropout_seed must be None, an int64 tensor of one element, or an int of 64 bits; got "
            f"{dropout_seed!r}"
        )
    return torch.tensor([dropout_seed], dtype=torch.int64, device="cpu")


def window_sides(window: Window) -> tuple[int, int]:
    if window is None:
        return -1, -1
    try:
        left, right = (-1 if side is None else side for side in window)
        valid = left >= -1 and right >= -1
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            "window must be None or (left, right), each None or an int of at least −1; got "
            f"{window!r}"
        )
    return left, right


def _is_bottom_right(causal_align: str) -> bool:
    if causal_align not in ("bottom_right", "top_left"):
        raise ValueError(f"causal_align must be 'bottom_right' or 'top_left'; got {causal_align!r}")
    return causal_align == "bottom_right"
