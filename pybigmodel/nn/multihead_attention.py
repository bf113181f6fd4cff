"""torch.nn.MultiheadAttention on this library's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pybigmodel._torch_private import transforms_active
from pybigmodel.nn._masks import check_mask, merged
from pybigmodel.nn._packing import forget
from pybigmodel.nn._product import Met, product
from pybigmodel.nn.linear import Linear
from pybigmodel.ops._common import PRECISIONS, Precision, precision_code
from pybigmodel.ops.attention import attention, attention_varlen

MAX_HEAD_DIM = 256
WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


class MultiheadAttention(torch.nn.MultiheadAttention):
    """Drop-in for :class:`torch.nn.MultiheadAttention`, in inference and in training.

    ``concat_h(softmax(q_h·k_hᵀ/√D + mask)·v_h)·W_oᵀ + b_o`` with ``q = query·W_qᵀ + b_q`` and so
    on, cut into heads of D columns. The weights of attention exist in memory only where they are
    asked for; projections use packed copies of their weights as :class:`pybigmodel.nn.Linear` does.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first,
            device, dtype: as torch's; embed_dim / num_heads ≤ 256.
        precision: "fp32", or "bf16": products of operands rounded to bfloat16, summed in fp32 (but
            for attention's where the weights are asked for); tensors keep their dtype. bfloat16
            weights always take the latter. May be assigned.

    Call it as torch's: with (L, N, E) tensors or, with ``batch_first``, (N, L, E), or without N;
    ``key_padding_mask`` (N, S) or (S,), and ``attn_mask`` (L, S) or (N·num_heads, L, S), of bool
    (True hides) or float (added). ``need_weights`` is True by default, as torch's, and costs the
    time and memory of all weights: say False. ``is_causal`` is a hint, as torch's, that
    ``attn_mask`` is the causal one, which is then not read; beside a ``key_padding_mask`` it is.

    A query from which everything is hidden gives zeros before the output projection, and weights of
    zero. (torch gives NaN or zeros, by the path that it takes.)

    Raises:
        RuntimeError: a wrong dtype, shape or device, naming the argument; ``is_causal`` without
            ``attn_mask``; nested tensors.
        NotImplementedError: on a device without kernels; forward-mode derivatives.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: Precision = "fp32",
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        self._set_up(precision)
        self.out_proj = Linear.from_linear(self.out_proj, precision=precision)  # type: ignore[assignment]

    def _set_up(self, precision: str) -> None:
        """What it has beyond torch's, which may have been a torch.nn.MultiheadAttention before."""
        if self.head_dim > MAX_HEAD_DIM:
            raise ValueError(
                f"MultiheadAttention: embed_dim / num_heads must be at most {MAX_HEAD_DIM}, "
                f"got {self.embed_dim} / {self.num_heads}"
            )
        self._precision = precision_code(precision)
        self._met: dict[str, Met] = {name: {} for name in WEIGHTS}

    @property
    def precision(self) -> str:
        """What the products are computed in: "fp32" or "bf16"."""
        return next(name for name, code in PRECISIONS.items() if code == self._precision)

    @precision.setter
    def precision(self, value: str) -> None:
        self._precision = precision_code(value)
        if isinstance(self.out_proj, Linear):
            self.out_proj.precision = value

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        heads, weights = self._attend(
            query, key, value, key_padding_mask, need_weights, attn_mask, is_causal
        )
        if weights is not None and average_attn_weights:
            weights = weights.mean(-3)
        return self.out_proj(heads), weights

    def packed(self, x: Tensor, starts: Tensor) -> Tensor:
        """Self-attention of sequences that lie end to end; no weights, no masks, no hooks, and
        nothing of bias_k, bias_v and add_zero_attn.

        Args:
            x: (T, embed_dim).
            starts: (sequences + 1,) int64, where each sequence starts, and T.
        """
        q, k, v = self._projected(x, x, x)
        heads: Any = attention_varlen(
            q,
            k,
            v,
            starts,
            starts,
            dropout_p=self.dropout if self.training else 0.0,
            precision="bf16" if self._precision else None,
        )
        y: Tensor = self.out_proj(heads.flatten(1))
        return y

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """What goes into the output projection, in query's layout, and the weights by head."""
        self._check(query, key, value, key_padding_mask, attn_mask)
        if is_causal and attn_mask is None:
            raise _error(
                "attn_mask must be given with is_causal, a hint that it is the causal one "
                "(torch.nn.Transformer.generate_square_subsequent_mask makes it); got None"
            )
        batched = query.dim() == 3
        to_heads, back = _layouts(batched, self.batch_first)
        q, k, v = (to_heads(t) for t in self._projected(query, key, value))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        causal = is_causal and key_padding_mask is None and not need_weights
        mask = merged(
            None if causal else attn_mask,
            key_padding_mask,
            batch=q.shape[0],
            heads=self.num_heads,
            extra=(self.bias_k is not None) + self.add_zero_attn,
            dtype=q.dtype,
        )
        k, v = self._extended(k, self.bias_k), self._extended(v, self.bias_v)
        dropout_p = self.dropout if self.training else 0.0
        if need_weights:
            heads, weights = _attention_with_weights(q, k, v, mask, dropout_p)
            return back(heads), weights if batched else weights.squeeze(0)
        out: Any = attention(
            q,
            k,
            v,
            attn_mask=mask,
            causal=causal,
            causal_align="top_left",  # as torch's hint means it, extra keys included
            dropout_p=dropout_p,
            precision="bf16" if self._precision else None,
        )
        return back(out), None

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(..., H, D) each; what is one tensor is multiplied once."""
        e, heads = self.embed_dim, (self.num_heads, self.head_dim)
        if not self._qkv_same_embed_dim:
            tensors = zip(("q", "k", "v"), (query, key, value), (0, e, 2 * e), strict=True)
            q, k, v = (
                self._product(f"{name}_proj_weight", x, at, at + e).unflatten(-1, heads)
                for name, x, at in tensors
            )
        elif query is key and key is value:
            all3 = self._product("in_proj_weight", query, 0, 3 * e)
            q, k, v = all3.unflatten(-1, (3, *heads)).unbind(-3)
        elif key is value:
            q = self._product("in_proj_weight", query, 0, e).unflatten(-1, heads)
            both = self._product("in_proj_weight", key, e, 3 * e)
            k, v = both.unflatten(-1, (2, *heads)).unbind(-3)
        else:
            q, k, v = (
                self._product("in_proj_weight", x, at, at + e).unflatten(-1, heads)
                for x, at in ((query, 0), (key, e), (value, 2 * e))
            )
        return q, k, v

    def _product(self, name: str, input: Tensor, start: int, stop: int) -> Tensor:
        """The input times the weight's part for these columns of q, k and v together."""
        weight, bias = getattr(self, name), self.in_proj_bias
        part = None if bias is None else bias[start:stop]
        whole = name != "in_proj_weight" or stop - start == 3 * self.embed_dim
        return product(
            "MultiheadAttention",
            input,
            weight,
            part,
            self._precision,
            self._met[name],
            rows=(0, None) if whole else (start, stop),
        )

    def _extended(self, keys: Tensor, bias: Tensor | None) -> Tensor:
        """Keys or values, and after them those that every sequence has."""
        b, h, _, d = keys.shape
        more = []
        if bias is not None:
            more.append(bias.view(1, h, 1, d).expand(b, h, 1, d).to(keys.dtype))
        if self.add_zero_attn:
            more.append(keys.new_zeros(b, h, 1, d))
        return torch.cat([keys, *more], 2) if more else keys

    # --- checks ----------------------------------------------------------------------------------

    def _check(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> None:
        tensors = {"query": query, "key": key, "value": value}
        nested = [name for name, x in tensors.items() if x.is_nested]
        if nested:
            raise _error(
                f"{nested[0]} must not be nested: pad it and pass key_padding_mask, or use "
                "torch.nn.MultiheadAttention there (pbm.restore puts it back)"
            )
        dim = query.dim()
        if dim not in (2, 3):
            raise _error(f"query must have 2 or 3 dimensions, got shape {tuple(query.shape)}")
        widths = (("embed_dim", self.embed_dim), ("kdim", self.kdim), ("vdim", self.vdim))
        for (name, x), (of, width) in zip(tensors.items(), widths, strict=True):
            if x.dim() != dim:
                raise _error(
                    f"{name} must have query's {dim} dimensions, got shape {tuple(x.shape)}"
                )
            if x.shape[-1] != width:
                raise _error(
                    f"{name}'s last dimension must be {of} = {width}, got shape {tuple(x.shape)}"
                )
        if key.shape[:-1] != value.shape[:-1]:
            raise _error(
                f"value must have key's length and batch, got {tuple(value.shape)} beside "
                f"{tuple(key.shape)}"
            )
        at_length = 1 if self.batch_first and dim == 3 else 0
        batch = [x.shape[1 - at_length] for x in (query, key)] if dim == 3 else [1, 1]
        if batch[0] != batch[1]:
            raise _error(f"key must have query's batch of {batch[0]}, got {tuple(key.shape)}")
        lengths = query.shape[at_length], key.shape[at_length]
        if key_padding_mask is not None:
            expected = (batch[0], lengths[1]) if dim == 3 else lengths[1:]
            check_mask("MultiheadAttention", "key_padding_mask", key_padding_mask, expected)
        if attn_mask is not None:
            by_head = (batch[0] * self.num_heads,) if attn_mask.dim() == 3 else ()
            check_mask("MultiheadAttention", "attn_mask", attn_mask, (*by_head, *lengths))

    # --- packed copies: as in Linear -------------------------------------------------------------

    def forget_packed(self) -> None:
        """Drop the packed copies of the weights; the next call makes them again."""
        for name in WEIGHTS:
            forget(self._parameters.get(name))
        self._met = {name: {} for name in WEIGHTS}

    def register_parameter(self, name: str, param: torch.nn.Parameter | None) -> None:
        if name in WEIGHTS:
            self.forget_packed()
        super().register_parameter(name, param)

    def train(self, mode: bool = True) -> MultiheadAttention:
        if mode != self.training:
            self.forget_packed()
        super().train(mode)
        return self

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> MultiheadAttention:
        self.forget_packed()
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.forget_packed()
        super()._load_from_state_dict(*args, **kwargs)

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_heads={self.num_heads}, precision={self.precision!r}"


def _error(what: str) -> RuntimeError:
    return RuntimeError(f"pybigmodel.nn.MultiheadAttention: {what}")


def _layouts(
    batched: bool, batch_first: bool
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]:
    """From (..., H, D) as the input lies to a view (B, H, S, D), and back to (..., H·D)."""
    if not batched:
        return (
            lambda t: t.transpose(0, 1).unsqueeze(0),
            lambda t: t.squeeze(0).transpose(0, 1).flatten(1),
        )
    if batch_first:
        return lambda t: t.transpose(1, 2), lambda t: t.transpose(1, 2).flatten(2)
    return lambda t: t.permute(1, 2, 0, 3), lambda t: t.permute(2, 0, 1, 3).flatten(2)


def _attention_with_weights(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout_p: float
) -> tuple[Tensor, Tensor]:
    """Attention by torch's ops, since the weights have to exist."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    recorded = scores.requires_grad or (mask is not None and mask.requires_grad)
    if recorded or torch.compiler.is_compiling() or transforms_active():
        weights = _weights(scores, mask)
    else:
        weights = _weights_in_place(scores, mask)
    weights = F.dropout(weights, dropout_p, training=dropout_p > 0)
    return weights @ v, weights


def _weights(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return scores.softmax(-1)
    empty = _empty_rows(mask)
    if mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    else:
        scores = scores + mask.to(scores.dtype)
    # Neither forward nor backward may meet a row of −inf.
    return scores.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0)


def _weights_in_place(scores: Tensor, mask: Tensor | None) -> Tensor:
    # Each further matrix of this size is new memory from the system, whose page faults took as long
    # as everything else at 512 keys.
    if mask is not None and mask.dtype == torch.bool:
        scores.masked_fill_(~mask, -torch.inf)
    elif mask is not None:
        scores.add_(mask)
    weights = torch.softmax(scores, -1, out=scores)
    return weights if mask is None else weights.masked_fill_(_empty_rows(mask), 0)


def _empty_rows(mask: Tensor) -> Tensor:
    hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    return hidden.all(-1, keepdim=True)
