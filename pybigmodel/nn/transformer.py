"""torch.nn's transformer layers and stacks on this library's kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pybigmodel._torch_private import autocast_enabled, hooked_everywhere
from pybigmodel.nn._activation import activated, hooked
from pybigmodel.nn._masks import check_mask, hides_the_future
from pybigmodel.nn.linear import Linear
from pybigmodel.nn.multihead_attention import MultiheadAttention
from pybigmodel.ops._common import Precision

ActivationFunction = str | Callable[[Tensor], Tensor]


class _Layer(nn.Module):
    """The constructor of both kinds of layer, before torch's."""

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
        _adopt(self, precision)


class TransformerEncoderLayer(_Layer, nn.TransformerEncoderLayer):
    """Drop-in for :class:`torch.nn.TransformerEncoderLayer`, in inference and in training.

    ``x = norm1(x + attention(x)); y = norm2(x + linear2(act(linear1(x))))``, with ``norm_first``
    ``x = x + attention(norm1(x)); y = x + linear2(act(linear1(norm2(x))))``. The attention is a
    :class:`pybigmodel.nn.MultiheadAttention`, the linear layers are :class:`pybigmodel.nn.Linear`.
    Where no gradient is wanted, a relu, gelu or silu is done within the product of linear1.

    Args:
        d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps, batch_first,
            norm_first, bias, device, dtype: as torch's; d_model / nhead ≤ 256.
        precision: "fp32" or "bf16", of all products: see :class:`pybigmodel.nn.Linear`.

    Call it as torch's; masks are those of :class:`pybigmodel.nn.MultiheadAttention`.

    Raises:
        RuntimeError, NotImplementedError: as pybigmodel.nn.MultiheadAttention and Linear.
    """

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        if src.is_nested:
            return self._of_nested(src, src_mask, src_key_padding_mask)

        return self._run(
            src,
            lambda x: self._sa_block(x, src_mask, src_key_padding_mask, is_causal=is_causal),
        )

    def _end_to_end(self, x: Tensor, starts: Tensor) -> Tensor:
        """The layer for sequences that lie end to end: see MultiheadAttention."""
        attention: MultiheadAttention = self.self_attn  # type: ignore[assignment]
        return self._run(x, lambda x: self.dropout1(attention._end_to_end(x, starts)))

    def _run(self, x: Tensor, attention: Callable[[Tensor], Tensor]) -> Tensor:
        if self.norm_first:
            x = x + attention(self.norm1(x))
            return x + self._ff_block(self.norm2(x))
        x = self.norm1(x + attention(x))
        y: Tensor = self.norm2(x + self._ff_block(x))
        return y

    def _ff_block(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout2(
            self.linear2(self.dropout(activated(self.activation, self.linear1, x)))
        )
        return y

    def _takes_end_to_end(self) -> bool:
        """Whether `_end_to_end` leaves out nothing that would be called."""
        attention = self.self_attn
        return (
            type(attention) is MultiheadAttention
            and attention.batch_first
            and attention.bias_k is None
            and not attention.add_zero_attn
            and not hooked(attention)
            and type(self)._sa_block is nn.TransformerEncoderLayer._sa_block
        )

    def _of_nested(
        self, src: Tensor, src_mask: Tensor | None, src_key_padding_mask: Tensor | None
    ) -> Tensor:
        masked = src_mask is not None or src_key_padding_mask is not None
        if masked or src.layout is not torch.strided or not self._takes_end_to_end():
            raise RuntimeError(
                "pybigmodel.nn.TransformerEncoderLayer: src may be nested only where torch's fast "
                "path takes it (batch_first, layout torch.strided, no masks, no hooks on "
                f"self_attn), got layout {src.layout}: pad it and pass src_key_padding_mask"
            )
        sequences = src.unbind()
        lengths = [sequence.shape[0] for sequence in sequences]
        starts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0))
        y = self._end_to_end(torch.cat(sequences), starts)
        return torch.nested.as_nested_tensor(list(y.split(lengths)))


class TransformerDecoderLayer(_Layer, nn.TransformerDecoderLayer):
    """Drop-in for :class:`torch.nn.TransformerDecoderLayer`, in inference and in training.

    Self-attention, attention to the memory and linear layers, each added to its input and
    normalised after it (or, with ``norm_first``, before), as in torch's. Arguments, numerics and
    errors are those of :class:`TransformerEncoderLayer`.
    """

    def _ff_block(self, x: Tensor) -> Tensor:
        y: Tensor = self.dropout3(
            self.linear2(self.dropout(activated(self.activation, self.linear1, x)))
        )
        return y


class TransformerEncoder(nn.TransformerEncoder):
    """Drop-in for :class:`torch.nn.TransformerEncoder`: the layers one after the other.

    Arguments are torch's; the layers are copies of ``encoder_layer``, which may be of any class.
    Where torch's computes nested tensors (inference with a left-aligned ``src_key_padding_mask`` of
    True for padding, no ``mask``, ``enable_nested_tensor``), padding is left out of all
    computation, and what comes out in its place is zero before ``norm``, as from torch's. A
    ``mask`` is compared with the causal one where ``is_causal`` is None, but not in a compiled
    graph, which cannot see its values.
    """

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        batch_first = self.layers[0].self_attn.batch_first
        if src_key_padding_mask is not None and src.dim() == 3 and not src.is_nested:
            shape = tuple(src.shape[:2] if batch_first else src.shape[1::-1])
            check_mask("TransformerEncoder", "src_key_padding_mask", src_key_padding_mask, shape)
        padding = self._padding_without_which(src, mask, src_key_padding_mask)
        if padding is not None:
            output = self._without(padding, src)
        else:
            is_causal = _is_causal(mask, is_causal, src, batch_first)
            output = src
            for layer in self.layers:
                output = layer(
                    output,
                    src_mask=mask,
                    is_causal=is_causal,
                    src_key_padding_mask=src_key_padding_mask,
                )
        return output if self.norm is None else self.norm(output)

    def _padding_without_which(
        self, src: Tensor, mask: Tensor | None, src_key_padding_mask: Tensor | None
    ) -> Tensor | None:
        """Where src is padding, if the layers need not see it; the conditions are torch's."""
        first = self.layers[0]
        if (
            src_key_padding_mask is None
            or mask is not None
            or not torch.backends.mha.get_fastpath_enabled()
            or not getattr(self, "use_nested_tensor", False)  # an old pickle's
            or first.training
            or src.dim() != 3
            or src.is_nested
            or torch.compiler.is_compiling()
            or autocast_enabled()
            or (
                torch.is_grad_enabled()
                and (src.requires_grad or any(p.requires_grad for p in first.parameters()))
            )
        ):
            return None
        padding = src_key_padding_mask != 0  # torch takes a float mask so too
        if getattr(self, "mask_check", True) and bool((padding[:, :-1] & ~padding[:, 1:]).any()):
            return None
        return padding

    def _without(self, padding: Tensor, src: Tensor) -> Tensor:
        # Hooks see (N, S, D), whatever the path: who looks on has no use for tokens end to end.
        if not hooked_everywhere() and all(
            type(layer) is TransformerEncoderLayer
            and layer._takes_end_to_end()
            and not any(map(hooked, layer.modules()))
            for layer in self.layers
        ):
            seen = ~padding
            starts = F.pad(seen.sum(1).cumsum(0), (1, 0))
            x = src[seen]
            for layer in self.layers:
                x = layer._end_to_end(x, starts)
            output = src.new_zeros(src.shape)
            output[seen] = x
            return output
        output = src
        for layer in self.layers:
            output = layer(output, src_key_padding_mask=padding)
        return output.masked_fill(padding.unsqueeze(-1), 0.0)


class TransformerDecoder(nn.TransformerDecoder):
    """Drop-in for :class:`torch.nn.TransformerDecoder`: the layers one after the other.

    Arguments are torch's; the layers are copies of ``decoder_layer``, which may be of any class. A
    ``tgt_mask`` is compared with the causal one where ``tgt_is_causal`` is None, but not in a
    compiled graph, which cannot see its values.
    """

    def forward(
        self,
        tgt: Tensor,
        memory: Tensor,
        tgt_mask: Tensor | None = None,
        memory_mask: Tensor | None = None,
        tgt_key_padding_mask: Tensor | None = None,
        memory_key_padding_mask: Tensor | None = None,
        tgt_is_causal: bool | None = None,
        memory_is_causal: bool = False,
    ) -> Tensor:
        batch_first = self.layers[0].self_attn.batch_first
        return super().forward(
            tgt,
            memory,
            tgt_mask,
            memory_mask,
            tgt_key_padding_mask,
            memory_key_padding_mask,
            _is_causal(tgt_mask, tgt_is_causal, tgt, batch_first),
            memory_is_causal,
        )


class Transformer(nn.Transformer):
    """Drop-in for :class:`torch.nn.Transformer`, an encoder and a decoder of the layers above.

    Args:
        precision: "fp32" or "bf16", of all products; not of a custom_encoder or custom_decoder.

    The others are torch's.
    """

    def __init__(
        self,
        d_model: int = 512,
        nhead: int = 8,
        num_encoder_layers: int = 6,
        num_decoder_layers: int = 6,
        dim_feedforward: int = 2048,
        dropout: float = 0.1,
        activation: ActivationFunction = F.relu,
        custom_encoder: Any | None = None,
        custom_decoder: Any | None = None,
        layer_norm_eps: float = 1e-5,
        batch_first: bool = False,
        norm_first: bool = False,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        precision: Precision = "fp32",
    ) -> None:
        width = (d_model, nhead, dim_feedforward, dropout, activation, layer_norm_eps)
        options = (batch_first, norm_first, bias, device, dtype)

        def norm() -> nn.LayerNorm:
            return nn.LayerNorm(d_model, layer_norm_eps, True, bias, device, dtype)

        # In torch's order, so that a seed gives the same weights.
        if custom_encoder is None:
            of_encoder = TransformerEncoderLayer(*width, *options, precision=precision)
            custom_encoder = TransformerEncoder(of_encoder, num_encoder_layers, norm())
        if custom_decoder is None:
            of_decoder = TransformerDecoderLayer(*width, *options, precision=precision)
            custom_decoder = TransformerDecoder(of_decoder, num_decoder_layers, norm())
        super().__init__(
            d_model,
            nhead,
            custom_encoder=custom_encoder,
            custom_decoder=custom_decoder,
            batch_first=batch_first,
        )


def _adopt(layer: Any, precision: Precision) -> None:
    """Turn what torch's constructor made into this library's."""
    for name in ("linear1", "linear2"):
        setattr(layer, name, Linear.from_linear(getattr(layer, name), precision=precision))
    for name in ("self_attn", "multihead_attn"):
        attention = layer._modules.get(name)
        if attention is not None:
            attention.__class__ = MultiheadAttention
            attention._set_up(precision)
            attention.out_proj = Linear.from_linear(attention.out_proj, precision=precision)


def _is_causal(mask: Tensor | None, is_causal: bool | None, x: Tensor, batch_first: bool) -> bool:
    """torch's detection, where a None asks for it."""
    if is_causal is not None or mask is None:
        return bool(is_causal)
    return hides_the_future(mask, x.shape[1 if batch_first and x.dim() == 3 else 0])
