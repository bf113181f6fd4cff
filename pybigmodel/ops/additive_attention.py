"""Additive (Bahdanau) attention without the tensor of (Sq × Sk × H) hyperbolic tangents."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pybigmodel._torch_private import below_autograd, forward_ad, register_function
from pybigmodel.ops import _checks as check
from pybigmodel.ops._attention_checks import check_dropout, check_mask
from pybigmodel.ops._autocast import register_autocast
from pybigmodel.ops._common import ForwardModeError, once_differentiable, refuse_forward_mode
from pybigmodel.ops.attention import seed_of

_ops = torch.ops.pybigmodel
_additive_attention = _ops.additive_attention.default
_additive_attention_backward = _ops.additive_attention_backward.default


def additive_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    *,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_seed: int | Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Additive attention in O(S·H) memory; differentiable.

    ::

        s_ij = Σ_h v_h·tanh(query_ih + key_jh)
        s_ij = s_ij + attn_mask_ij          if it is floating; hidden where a bool one is False
        out_i = Σ_j softmax_j(s_ij)·m_ij·value_j,  lse_i = ln Σ_j exp(s_ij)

    m_ij is 1, or under dropout 0 with probability ``dropout_p`` and 1/(1 − dropout_p) otherwise. A
    query to which every key is hidden gives zeros and an lse of −∞.

    Args:
        query: (B, Sq, H), float32, bfloat16 or float16; read in place if its last dimension is
            contiguous, as are the others.
        key: (B, Sk, H), query's dtype. Both are what a layer's projections give.
        value: (B, Sk, Dv), query's dtype.
        v: (H,), query's dtype.
        attn_mask: bool, float32 or query's dtype, broadcastable to (B, Sq, Sk).
        dropout_seed: an int, or an int64 tensor of one element; None draws one from torch's default
            generator. Element (b, i, j) is kept as by :func:`attention` with one head.
        return_lse: also return lse, (B, Sq) float32.

    Returns:
        (B, Sq, Dv), query's dtype; with ``return_lse`` a pair.

    Numerics: everything in float32, one rounding to query's dtype. A score is off by at most
    1e-6·Σ|v|, and where the keys of a column are below 0.75 by at most 1e-6·Σ|v|·(|query| + |key|);
    by much less in sums of many columns. Beyond ±15, keys take a slower way. For a query, results
    depend neither on the other queries, unless there are three or fewer, nor on the batch, nor on
    the number of threads; gradients are deterministic.

    Raises:
        RuntimeError: a wrong dtype, shape, device or value, naming the argument; a second
            derivative.
        NotImplementedError: a forward-mode derivative.

    Source: Bahdanau et al., "Neural Machine Translation by Jointly Learning to Align and
    Translate", 2015, appendix A.1.2.
    """
    if forward_ad._current_level >= 0:
        refuse_forward_mode(
            "additive_attention", query=query, key=key, value=value, v=v, attn_mask=attn_mask
        )
    seed = seed_of(dropout_p, dropout_seed)
    out, lse = _additive_attention(query, key, value, v, attn_mask, seed, dropout_p)
    return (out, lse) if return_lse else out


# --- fake kernels -------------------------------------------------------------------------------


def _check(
    op: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_seed: Tensor | None,
    dropout_p: float,
) -> None:
    check.check_float(op, "query", query)
    check.check_dim(op, "query", query, 3)
    b, _, h = query.shape
    for name, tensor in (("key", key), ("value", value)):
        check.check_dim(op, name, tensor, 3)
        check.check_dtype(op, name, tensor, query.dtype)
        check.check_same_device(op, name, tensor, query)
        torch._check(
            tensor.shape[0] == b,
            lambda name=name, tensor=tensor: (
                f"{op}: {name} must have query's batch size {b}, got shape {tuple(tensor.shape)}"
            ),
        )
    torch._check(
        key.shape[2] == h,
        lambda: f"{op}: key must have query's last dimension {h}, got shape {tuple(key.shape)}",
    )
    torch._check(
        value.shape[1] == key.shape[1],
        lambda: (
            f"{op}: value must have key's length {key.shape[1]}, got shape {tuple(value.shape)}"
        ),
    )
    check.check_dtype(op, "v", v, query.dtype)
    check.check_shape(op, "v", v, (h,), f"must have shape ({h},)")
    check.check_same_device(op, "v", v, query)
    check_mask(op, attn_mask, query, key, "query")
    check_dropout(op, dropout_seed, dropout_p, query)


@torch.library.register_fake("pybigmodel::additive_attention")
def _additive_attention_fake(
    query: Tensor, key: Tensor, value: Tensor, v: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    _check("additive_attention", query, key, value, v, *options)
    rows = query.shape[:2]
    return query.new_empty((*rows, value.shape[2])), query.new_empty(rows, dtype=torch.float32)


@torch.library.register_fake("pybigmodel::additive_attention_backward")
def _additive_attention_backward_fake(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    dropout_seed: Tensor | None,
    dropout_p: float,
    need_hidden: bool,
    need_value: bool,
    need_mask: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    op = "additive_attention_backward"
    _check(op, query, key, value, v, attn_mask, dropout_seed, dropout_p)
    rows = query.shape[:2]
    check.check_dtype(op, "grad_out", grad_out, query.dtype)
    check.check_same_device(op, "grad_out", grad_out, query)
    shape = (*rows, value.shape[2])
    check.check_shape(op, "grad_out", grad_out, shape, f"must have shape {tuple(shape)}")
    if grad_lse is not None:
        check.check_dtype(op, "grad_lse", grad_lse, torch.float32)
        check.check_same_device(op, "grad_lse", grad_lse, query)
        check.check_shape(op, "grad_lse", grad_lse, rows, f"must have shape {tuple(rows)}")
    if need_mask:
        keys = key.shape[1]
        torch._check(
            attn_mask is not None
            and attn_mask.is_floating_point()
            and attn_mask.dim() > 0
            and attn_mask.shape[-1] == keys,
            lambda: (
                f"{op}: attn_mask must be floating with a value for each of {keys} keys where "
                f"need_mask is set, got "
                + (
                    "None"
                    if attn_mask is None
                    else f"{tuple(attn_mask.shape)} of {check.name_of(attn_mask.dtype)}"
                )
            ),
        )
    fp32 = torch.float32
    mask_shape = attn_mask.shape if need_mask and attn_mask is not None else (0,)
    return (
        query.new_empty(query.shape if need_hidden else (0,)),
        key.new_empty(key.shape if need_hidden else (0,)),
        value.new_empty(value.shape if need_value else (0,)),
        v.new_empty(v.shape if need_hidden else (0,), dtype=fp32),
        query.new_empty(mask_shape, dtype=fp32),
    )


# --- autograd -----------------------------------------------------------------------------------


class _AdditiveAttention(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, Tensor]:
        results: tuple[Tensor, Tensor] = below_autograd(_additive_attention, *args)
        return results

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.dropout_p = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        query, key, value, v, mask, seed, lse = ctx.saved_tensors
        grad_out, grad_lse = grads
        if grad_out is None:
            if grad_lse is None:
                return (None,) * 7
            grad_out = value.new_zeros((*query.shape[:2], value.shape[2]))
        needs = ctx.needs_input_grad
        one_value = mask is not None and (mask.dim() == 0 or mask.shape[-1] != key.shape[1])
        *gradients, grad_mask = _additive_attention_backward(
            grad_out,
            grad_lse,
            query,
            key,
            value,
            v,
            mask,
            seed,
            ctx.dropout_p,
            needs[0] or needs[1] or needs[3],
            needs[2],
            needs[4] and not one_value,
        )
        gradients[3] = gradients[3].to(v.dtype)
        if needs[4]:
            if one_value:
                grad_mask = _of_one_value(mask, lse, grad_lse)
            grad_mask = grad_mask.to(mask.dtype)
        needed = zip((*gradients, grad_mask), needs, strict=False)
        return (*(grad if need else None for grad, need in needed), None, None)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        raise ForwardModeError("additive_attention: forward-mode derivatives are not implemented")


def _of_one_value(mask: Tensor, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
    """The gradient of a mask that is one value for all keys: it moves lse, and no weight."""
    if grad_lse is None:
        return torch.zeros_like(mask)
    return grad_lse.masked_fill(lse == -torch.inf, 0).unsqueeze(-1).sum_to_size(mask.shape)


_library = torch.library.Library("pybigmodel", "IMPL")
register_function(_library, _additive_attention, _AdditiveAttention)
register_function(
    _library,
    _additive_attention_backward,
    once_differentiable(_additive_attention_backward, "additive_attention"),
)

# --- autocast: a mask may stay float32 beside any dtype ------------------------------------------

register_autocast("additive_attention", (0, 1, 2, 3))
