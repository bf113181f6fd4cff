"""Additive (Bahdanau) attention with its projections."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pybigmodel.nn._masks import check_mask, merged
from pybigmodel.nn.linear import Linear
from pybigmodel.ops._checks import name_of
from pybigmodel.ops.additive_attention import additive_attention

NAME = "AdditiveAttention"


class AdditiveAttention(torch.nn.Module):
    """Bahdanau's attention layer, in inference and in training.

    ::

        s_ij = Σ_h v_h·tanh(W_q·query_i + b + W_k·key_j)_h
        output_i = Σ_j softmax_j(s_ij)·value_j

    in O(S·hidden_dim) memory: neither the tensor of hyperbolic tangents nor, unless asked for, that
    of the weights exists. One bias is enough: the two of both projections would be added up, and
    one of the scores would shift all alike.

    Args:
        query_dim: columns of query (a decoder's states).
        key_dim: columns of key (an encoder's states).
        hidden_dim: columns of both projections.
        bias: whether there is b.
        dropout: the probability with which a weight is left out in training; the others grow by
            1/(1 − dropout).
        device, dtype: of the parameters, which are ``query_proj.weight`` (hidden_dim, query_dim),
            ``query_proj.bias`` (hidden_dim,), ``key_proj.weight`` (hidden_dim, key_dim) and ``v``
            (hidden_dim,).
        precision: of the projections, as of :class:`pybigmodel.nn.Linear`. What follows is computed
            in float32 always (:func:`pybigmodel.ops.additive_attention`).

    Call it with:
        query: (B, Sq, query_dim).
        key: (B, Sk, key_dim).
        value: (B, Sk, Dv); by default key. All three of the layer's dtype, but under autocast.
        key_padding_mask: (B, Sk), as in torch.nn: bool (True hides the key) or float (added).
        attn_mask: (Sq, Sk) or (B, Sq, Sk), likewise.
        need_weights: whether to return the weights, in training after dropout: (B, Sq, Sk). Takes
            Sk columns more of value, and the memory.

    Returns:
        output (B, Sq, Dv), and the weights or None. A query from which every key is hidden gives
        zeros, and weights of zero.

    A decoder that meets the same keys at every step projects them once::

        projected = layer.key_proj(key)
        output, _ = layer.attend(query, projected, key)

    Raises:
        RuntimeError: a wrong dtype, shape or device, naming the argument.
        NotImplementedError: on a device without kernels; forward-mode derivatives.

    Source: Bahdanau et al., "Neural Machine Translation by Jointly Learning to Align and
    Translate", 2015, appendix A.1.2.
    """

    def __init__(
        self,
        query_dim: int,
        key_dim: int,
        hidden_dim: int,
        bias: bool = True,
        dropout: float = 0.0,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: str = "fp32",
    ) -> None:
        super().__init__()
        if not 0 <= dropout <= 1:
            raise ValueError(f"AdditiveAttention: dropout must be in [0, 1], got {dropout}")
        self.query_dim, self.key_dim, self.hidden_dim = query_dim, key_dim, hidden_dim
        self.dropout = dropout
        self.query_proj = Linear(query_dim, hidden_dim, bias, device, dtype, precision=precision)
        self.key_proj = Linear(key_dim, hidden_dim, False, device, dtype, precision=precision)
        self.v = torch.nn.Parameter(torch.empty(hidden_dim, device=device, dtype=dtype))
        self._reset_v()

    def reset_parameters(self) -> None:
        """As torch.nn.Linear's; v as the weight of one with hidden_dim columns and one row."""
        self.query_proj.reset_parameters()
        self.key_proj.reset_parameters()
        self._reset_v()

    def _reset_v(self) -> None:
        bound = self.hidden_dim**-0.5 if self.hidden_dim else 0.0
        torch.nn.init.uniform_(self.v, -bound, bound)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        self._check("key", key, ("key_dim", self.key_dim))
        return self.attend(
            query,
            self.key_proj(key),
            key if value is None else value,
            key_padding_mask,
            need_weights,
            attn_mask,
        )

    def attend(
        self,
        query: Tensor,
        projected_key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The layer behind ``projected_key = key_proj(key)``, (B, Sk, hidden_dim)."""
        self._check("query", query, ("query_dim", self.query_dim))
        self._check("projected_key", projected_key, ("hidden_dim", self.hidden_dim))
        self._check("value", value)
        b, sq, sk = query.shape[0], query.shape[1], projected_key.shape[1]
        _check_rows(projected_key, value, b)
        if key_padding_mask is not None:
            check_mask(NAME, "key_padding_mask", key_padding_mask, (b, sk))
        if attn_mask is not None:
            by_sequence = (b,) if attn_mask.dim() == 3 else ()
            check_mask(NAME, "attn_mask", attn_mask, (*by_sequence, sq, sk))
        projected = self.query_proj(query)
        mask = _mask_of(attn_mask, key_padding_mask, b, projected.dtype)
        if not need_weights:
            return self._attention(projected, projected_key, value, mask), None
        # Weights are what values that are unit vectors give.
        units = torch.eye(sk, dtype=projected.dtype, device=projected.device).expand(b, sk, sk)
        weights = self._attention(projected, projected_key, units, mask)
        return weights @ value, weights

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        out = additive_attention(query, key, value, self.v, attn_mask=mask, dropout_p=dropout_p)
        assert isinstance(out, Tensor)
        return out

    def _check(self, name: str, x: Tensor, last: tuple[str, int] | None = None) -> None:
        if x.is_nested:
            raise _error(f"{name} must not be nested: pad it and pass key_padding_mask")
        if x.dim() != 3:
            raise _error(f"{name} must have 3 dimensions, got shape {tuple(x.shape)}")
        if last is not None and x.shape[2] != last[1]:
            raise _error(
                f"{name}'s last dimension must be {last[0]} = {last[1]}, got shape {tuple(x.shape)}"
            )
        if x.dtype != self.v.dtype and not torch.is_autocast_enabled("cpu"):
            raise _error(
                f"{name} must be {name_of(self.v.dtype)} as the layer is, got {name_of(x.dtype)}"
            )

    def extra_repr(self) -> str:
        return f"{self.query_dim}, {self.key_dim}, {self.hidden_dim}, dropout={self.dropout}"


def _error(what: str) -> RuntimeError:
    return RuntimeError(f"pybigmodel.nn.{NAME}: {what}")


def _check_rows(key: Tensor, value: Tensor, batch: int) -> None:
    if key.shape[0] != batch:
        raise _error(f"key must have query's batch of {batch}, got shape {tuple(key.shape)}")
    if value.shape[:2] != key.shape[:2]:
        raise _error(
            f"value must have key's batch and length {tuple(key.shape[:2])}, got shape "
            f"{tuple(value.shape)}"
        )


def _mask_of(
    attn_mask: Tensor | None, key_padding_mask: Tensor | None, batch: int, dtype: torch.dtype
) -> Tensor | None:
    """Both as the op takes them, with the one head squeezed out again."""
    mask = merged(attn_mask, key_padding_mask, batch=batch, heads=1, extra=0, dtype=dtype)
    return mask.squeeze(1) if mask is not None and mask.dim() == 4 else mask
