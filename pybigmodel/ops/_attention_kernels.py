"""What attention's ops need in Python: fake kernels, autograd, autocast."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pybigmodel._torch_private import below_autograd, register_function
from pybigmodel.ops import _checks as check
from pybigmodel.ops._attention_checks import (
    check_attention,
    check_mask,
    check_options,
    check_starts,
)
from pybigmodel.ops._autocast import register_autocast
from pybigmodel.ops._common import ForwardModeError, once_differentiable

_ops = torch.ops.pybigmodel
_attention = _ops.attention.default
_attention_backward = _ops.attention_backward.default
_attention_varlen = _ops.attention_varlen.default
_attention_varlen_backward = _ops.attention_varlen_backward.default

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
    _, lse, statistics = _empty_results(q, v, q.shape[:-1])
    b, h, rows, _ = q.shape
    return q.new_empty((b, rows, h, v.shape[-1])).transpose(1, 2), lse, statistics


@torch.library.register_fake("pybigmodel::attention_varlen")
def _attention_varlen_fake(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    op = "attention_varlen"
    check_attention(op, q, k, v, 3)
    check_starts(op, cu_seqlens_q, cu_seqlens_k, q)
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
    check_starts(op, cu_seqlens_q, cu_seqlens_k, q)
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


def _differentiable(
    name: str, op: Any, gradient: Any, tensors: int
) -> type[torch.autograd.Function]:
    """Of an op whose first arguments are `tensors` tensors, with slopes and seed at their end.

    That of a dense one has a mask, whose gradient may be asked for, and is told of the backward
    pass, for which it keeps statistics that repeat the probabilities to the bit.
    """
    dense = op is _attention

    class Attention(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
            results: tuple[Tensor, Tensor, Tensor] = below_autograd(
                op, *((*args[:-1], True) if dense else args)
            )
            return results

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            if ctx.needs_input_grad[tensors - 2]:
                raise RuntimeError(
                    f"{name}: alibi_slopes requires grad, and it has no gradient: detach it"
                )
            out, _, statistics = output
            ctx.save_for_backward(*inputs[:tensors], out, statistics)
            ctx.mark_non_differentiable(statistics)
            ctx.options = inputs[tensors:-1] if dense else inputs[tensors:]
            ctx.set_materialize_grads(False)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
            q, k, v, *more, out, statistics = ctx.saved_tensors
            grad_out, grad_lse, _ = grads
            needed = ctx.needs_input_grad
            if grad_out is None:
                if grad_lse is None:
                    return (None,) * len(needed)
                grad_out = torch.zeros_like(out)
            arguments = (grad_out, grad_lse, q, k, v, out, statistics, *more, *ctx.options)
            need_mask = (needed[3] and more[0] is not None,) if dense else ()
            gradients = gradient(*arguments, *need_mask)
            wanted = (g if need else None for g, need in zip(gradients, needed, strict=False))
            return (*wanted, *(None,) * (len(needed) - len(gradients)))

        @staticmethod
        def jvp(ctx: Any, *tangents: Any) -> None:
            raise ForwardModeError(f"{name}: forward-mode derivatives are not implemented")

    return Attention


_library = torch.library.Library("pybigmodel", "IMPL")
for _name, _op, _gradient, _tensors in (
    ("attention", _attention, _attention_backward, 6),
    ("attention_varlen", _attention_varlen, _attention_varlen_backward, 7),
):
    register_function(_library, _op, _differentiable(_name, _op, _gradient, _tensors))
    register_function(_library, _gradient, once_differentiable(_gradient, _name))

# --- autocast: a mask may stay float32 beside any dtype ------------------------------------------

register_autocast("attention", (0, 1, 2), unless_float32=(3,))
register_autocast("attention_varlen", (0, 1, 2))
