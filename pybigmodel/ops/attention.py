"""Scaled dot-product attention with everything that the flash kernels offer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from pybigmodel._torch_private import below_autograd, forward_ad, register_function
from pybigmodel.ops import _checks as check
from pybigmodel.ops._attention_checks import (
    check_attention,
    check_mask,
    check_options,
    check_starts,
)
from pybigmodel.ops._autocast import register_autocast
from pybigmodel.ops._common import (
    ForwardModeError,
    Precision,
    once_differentiable,
    precision_code,
    refuse_forward_mode,
)

Align: TypeAlias = Literal["bottom_right", "top_left"]
Window: TypeAlias = "tuple[int | None, int | None] | None"

_ops = torch.ops.pybigmodel
_attention = _ops.attention.default
_attention_backward = _ops.attention_backward.default
_attention_varlen = _ops.attention_varlen.default
_attention_varlen_backward = _ops.attention_varlen_backward.default


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
        scale: default 1/√D.
        return_lse: also return lse, (B, Hq, Sq) float32.
        precision: "bf16" computes float32 and float16 tensors in bfloat16 products. By default
            bfloat16 tensors take these, the others float32 ones.

    Returns:
        (B, Hq, Sq, Dv), q's dtype; with ``return_lse`` a pair.

    Numerics: products are summed and the softmax is kept in float32 (probabilities are rounded to
    bfloat16 for bfloat16 products); 2^x has a relative error below 1.5e-7 (3e-6 before rounding to
    bfloat16). A row's result depends neither on its neighbours in the batch nor on the number of
    threads; gradients are deterministic.

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
        "attention", q, causal, window, alibi_slopes, softcap, dropout_p, dropout_seed, scale
    )
    bottom_right = _is_bottom_right(causal_align)
    code = 0 if precision is None else precision_code(precision)
    arguments = (
        q,
        k,
        v,
        attn_mask,
        alibi_slopes,
        options.seed,
        options.left,
        options.right,
        bottom_right,
        softcap,
        dropout_p,
        options.scale,
        code,
        False,
    )
    out, lse, _ = _attention(*arguments)
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
        "attention_varlen", q, causal, window, alibi_slopes, softcap, dropout_p, dropout_seed, scale
    )
    bottom_right = _is_bottom_right(causal_align)
    code = 0 if precision is None else precision_code(precision)
    out, lse, _ = _attention_varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        alibi_slopes,
        options.seed,
        options.left,
        options.right,
        bottom_right,
        softcap,
        dropout_p,
        options.scale,
        code,
    )
    return (out, lse) if return_lse else out


class _Options(NamedTuple):
    seed: Tensor | None
    left: int
    right: int
    scale: float


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
) -> _Options:
    if alibi_slopes is not None and alibi_slopes.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"{op}: alibi_slopes requires grad, and it has no gradient: detach it")
    left, right = window_sides(window)
    if causal:
        right = 0
    if scale is None:
        scale = q.shape[-1] ** -0.5 if q.dim() and q.shape[-1] else 1.0
    return _Options(seed_of(dropout_p, dropout_seed), left, right, scale)


def seed_of(dropout_p: float, dropout_seed: int | Tensor | None) -> Tensor | None:
    """As the ops take it; None: drawn from torch's default generator."""
    if dropout_p == 0:
        return None
    if dropout_seed is None:
        return torch.randint(2**63 - 1, (1,), dtype=torch.int64)
    if isinstance(dropout_seed, Tensor):
        return dropout_seed
    return torch.tensor([dropout_seed], dtype=torch.int64)


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


# --- fake kernels -------------------------------------------------------------------------------


@torch.library.register_fake("pybigmodel::attention")
def _attention_fake(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    op = "attention"
    *options, _for_backward = rest
    check_attention(op, q, k, v, 4)
    check_options(op, q, q.shape[0], q.shape[1], *options)
    check_mask(op, attn_mask, q, k)
    return _empty_results(q, v, q.shape[:-1])


@torch.library.register_fake("pybigmodel::attention_varlen")
def _attention_varlen_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    op = "attention_varlen"
    check_attention(op, q, k, v, 3)
    check_starts(op, cu_seqlens_q, cu_seqlens_k)
    check_options(op, q, cu_seqlens_q.shape[0] - 1, q.shape[1], *options)
    return _empty_results(q, v, (q.shape[1], q.shape[0]))


def _empty_results(q: Tensor, v: Tensor, rows: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        q.new_empty((*q.shape[:-1], v.shape[-1])),
        q.new_empty(rows, dtype=torch.float32),
        q.new_empty((2, *rows), dtype=torch.float32),
    )


@torch.library.register_fake("pybigmodel::attention_backward")
def _attention_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    attn_mask: Tensor | None,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    op = "attention_backward"
    need_mask = options[-1]
    options = options[:-1]
    check_attention(op, q, k, v, 4)
    check_options(op, q, q.shape[0], q.shape[1], *options)
    check_mask(op, attn_mask, q, k)
    _check_gradients(op, grad_out, grad_lse, q, v, out, statistics, q.shape[:-1])
    grad_mask = q.new_empty((0,))
    if need_mask and attn_mask is not None:
        grad_mask = attn_mask.new_empty(attn_mask.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), grad_mask


@torch.library.register_fake("pybigmodel::attention_varlen_backward")
def _attention_varlen_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    *options: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    op = "attention_varlen_backward"
    check_attention(op, q, k, v, 3)
    check_starts(op, cu_seqlens_q, cu_seqlens_k)
    check_options(op, q, cu_seqlens_q.shape[0] - 1, q.shape[1], *options)
    _check_gradients(op, grad_out, grad_lse, q, v, out, statistics, (q.shape[1], q.shape[0]))
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _check_gradients(
    op: str,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    v: Tensor,
    out: Tensor,
    statistics: Tensor,
    rows: tuple[int, ...],
) -> None:
    shape = (*q.shape[:-1], v.shape[-1])
    optional: tuple[tuple[str, Tensor | None, Sequence[int]], ...] = (
        ("statistics", statistics, (2, *rows)),
        ("grad_lse", grad_lse, rows),
    )
    for name, tensor in (("grad_out", grad_out), ("out", out)):
        check.check_same_device(op, name, tensor, q)
        check.check_dtype(op, name, tensor, q.dtype)
        check.check_shape(op, name, tensor, shape, f"must have shape {tuple(shape)}")
    for name, given, size in optional:
        if given is not None:
            check.check_same_device(op, name, given, q)
            check.check_dtype(op, name, given, torch.float32)
            check.check_shape(op, name, given, size, f"must have shape {tuple(size)}")


# --- autograd -----------------------------------------------------------------------------------


class _Attention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        # With statistics from which backward repeats the probabilities to the bit.
        results: tuple[Tensor, Tensor, Tensor] = below_autograd(_attention, *args[:-1], True)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        out, _, statistics = output
        ctx.save_for_backward(*inputs[:6], out, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.options = inputs[6:-1]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, mask, slopes, seed, out, statistics = ctx.saved_tensors
        grad_out, grad_lse, _ = grads
        if grad_out is None:
            if grad_lse is None:
                return (None,) * 14
            grad_out = torch.zeros_like(out)
        need_q, need_k, need_v, need_mask, *_ = ctx.needs_input_grad
        need_mask = need_mask and mask is not None
        grad_q, grad_k, grad_v, grad_mask = _attention_backward(
            grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            statistics,
            mask,
            slopes,
            seed,
            *ctx.options,
            need_mask,
        )
        return (
            grad_q if need_q else None,
            grad_k if need_k else None,
            grad_v if need_v else None,
            grad_mask if need_mask else None,
            *(None,) * 10,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise ForwardModeError("attention: forward-mode derivatives are not implemented")


class _AttentionVarlen(torch.autograd.Function):
    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
        results: tuple[Tensor, Tensor, Tensor] = below_autograd(_attention_varlen, *args)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        out, _, statistics = output
        ctx.save_for_backward(*inputs[:7], out, statistics)
        ctx.mark_non_differentiable(statistics)
        ctx.options = inputs[7:]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, starts_q, starts_k, slopes, seed, out, statistics = ctx.saved_tensors
        grad_out, grad_lse, _ = grads
        if grad_out is None:
            if grad_lse is None:
                return (None,) * 14
            grad_out = torch.zeros_like(out)
        gradients = _attention_varlen_backward(
            grad_out,
            grad_lse,
            q,
            k,
            v,
            out,
            statistics,
            starts_q,
            starts_k,
            slopes,
            seed,
            *ctx.options,
        )
        needed = zip(gradients, ctx.needs_input_grad, strict=False)
        return (*(grad if need else None for grad, need in needed), *(None,) * 11)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise ForwardModeError("attention_varlen: forward-mode derivatives are not implemented")


_library = torch.library.Library("pybigmodel", "IMPL")
register_function(_library, _attention, _Attention)
register_function(_library, _attention_varlen, _AttentionVarlen)
register_function(
    _library, _attention_backward, once_differentiable(_attention_backward, "attention")
)
register_function(
    _library,
    _attention_varlen_backward,
    once_differentiable(_attention_varlen_backward, "attention_varlen"),
)

# --- autocast: a mask may stay float32 beside any dtype ------------------------------------------

register_autocast("attention", (0, 1, 2))
register_autocast("attention_varlen", (0, 1, 2))
