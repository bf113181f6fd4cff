"""pybigmodel.ops.attention as an attention implementation of Hugging Face transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pybigmodel.integrations._left import note, why_left
from pybigmodel.ops._common import Precision, precision_code
from pybigmodel.ops.attention import attention

if TYPE_CHECKING:
    from collections.abc import Callable

    Attend = Callable[..., tuple[Tensor, None]]


def register_transformers(name: str = "pybigmodel", *, precision: Precision | None = None) -> None:
    """Give transformers an attention called `name`.

    Afterwards ``model.set_attn_implementation("pybigmodel")``, or ``attn_implementation=`` to
    ``from_pretrained`` and ``from_config``, puts a model on :func:`pybigmodel.ops.attention`.

    Grouped query heads read the cache as it is, without copies of keys and values; softcapped
    scores (Gemma 2), additive position biases (T5) and dropout in training are the op's own. As for
    "sdpa", no mask is made where it would only be causal, or hide nothing. What the op does not
    take (float64, other devices, head dimensions above 256) goes to "sdpa", and
    :func:`pybigmodel.integrations.left_to_torch` counts it.

    Attention weights do not exist: ``output_attentions=True`` raises where the model hands it on
    (GPT-2 returns none, as with "sdpa"), and so do attention sinks (gpt-oss), paged caches of
    continuous batching, and whatever else a model gives its attention that would change the
    result, as the indices of sparse attention (DeepSeek V3.2); "eager" has them.

    Models of transformers that compute attention by themselves do not ask for any (Falcon, BLOOM,
    GPT-J, MPT and DeBERTa, as of 5.23): they run as before.

    Args:
        name: for ``attn_implementation``; an implementation of that name is replaced.
        precision: of the products, as for the op: "bf16" computes float32 models in bfloat16.

    Raises:
        ModuleNotFoundError: transformers is not installed.
        RuntimeError: it is older than 4.53, which has no registry of mask functions.
    """
    if precision is not None:
        precision_code(precision)  # raises for an unknown one
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward
        from transformers.masking_utils import sdpa_mask
    except ModuleNotFoundError as missing:
        raise ModuleNotFoundError(
            f"register_transformers: {missing.name} is not installed; pip install transformers",
            name=missing.name,
        ) from missing
    except ImportError as old:
        raise RuntimeError(
            f"register_transformers: expected transformers 4.53 or later; {old}"
        ) from old
    AttentionInterface.register(name, _attention_forward(name, precision, sdpa_attention_forward))
    AttentionMaskInterface.register(name, _mask_function(sdpa_mask))


def _mask_function(sdpa_mask: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    """sdpa_mask, but a causal mask is left out only where it ends at the last key.

    sdpa's own leaves it out for the prompt in an empty StaticCache too, aligned to the first key,
    which is wrong once a model drops queries (Gemma 4 with logits_to_keep).
    """

    def mask(*, allow_is_causal_skip: bool = True, **options: Any) -> Tensor | None:
        # transformers 4 says the positions of the queries, 5 their number.
        queries = options["q_length"] if "q_length" in options else len(options["cache_position"])
        at_the_end = queries == 1 or queries == options["kv_length"]
        return sdpa_mask(allow_is_causal_skip=allow_is_causal_skip and at_the_end, **options)

    return mask


def _attention_forward(name: str, precision: Precision | None, substitute: Attend) -> Attend:
    """What transformers calls; q is (B, Hq, Sq, D) and the result (B, Sq, Hq, D)."""

    def forward(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        is_causal: bool | None = None,
        position_bias: Tensor | None = None,
        softcap: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        _refuse(name, kwargs)
        # One query sees its whole cache, and a mask says all there is to say.
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        causal = bool(causal) and attention_mask is None and query.shape[2] > 1
        mask = _with_bias(attention_mask, position_bias)
        reason = why_left(query, key, value, mask, dropout, grouped=True)
        if reason is not None:
            note(f"transformers with {reason}")
            if causal and query.shape[2] < key.shape[2]:  # which sdpa aligns to the first key
                attention_mask = _causal_mask(query, key)
            options = {"position_bias": position_bias, "softcap": softcap, **kwargs}
            given = {option: value for option, value in options.items() if value is not None}
            return substitute(
                module,
                query,
                key,
                value,
                attention_mask,
                dropout=dropout,
                scaling=scaling,
                is_causal=is_causal,
                **given,
            )
        out = attention(
            query,
            key,
            value,
            attn_mask=mask,
            causal=causal,
            softcap=softcap or 0.0,
            dropout_p=dropout,
            scale=scaling,
            precision=precision,
        )
        assert isinstance(out, Tensor)
        return out.transpose(1, 2).contiguous(), None

    return forward


# What "eager" does not read either: of what the model's forward was given, and for other kernels.
_WITHOUT_EFFECT = frozenset(
    {
        *("position_ids", "cache_position", "past_key_value", "past_key_values", "use_cache"),
        *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict"),
        *("num_items_in_batch", "sliding_window", "seq_idx", "deterministic"),
        *("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
    }
)
_NAMED = {
    "s_aux": "attention sinks (s_aux) are",
    "cache": "the paged cache of continuous batching (cache) is",
    "indices": "sparse attention (indices) is",
    "block_indices": "sparse attention (block_indices) is",
}


def _refuse(name: str, kwargs: dict[str, Any]) -> None:
    """Raise for what would change the result, and for what is not known not to."""
    if kwargs.get("output_attentions"):
        raise ValueError(
            f"{name}: output_attentions=True, but no attention weights exist; "
            'set_attn_implementation("eager") has them'
        )
    for option, value in kwargs.items():
        if value is not None and value is not False and option not in _WITHOUT_EFFECT:
            instead = "sdpa" if option == "cache" else "eager"
            raise NotImplementedError(
                f"{name}: {_NAMED.get(option, f'{option} is')} not implemented; "
                f'set_attn_implementation("{instead}") instead'
            )


def _causal_mask(query: Tensor, key: Tensor) -> Tensor:
    queries, keys = query.shape[2], key.shape[2]
    return query.new_ones(1, 1, queries, keys, dtype=torch.bool).tril(keys - queries)


def _with_bias(mask: Tensor | None, bias: Tensor | None) -> Tensor | None:
    """Both as one additive mask; the bias of a longer, empty StaticCache is as long as that."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)  # as eager and sdpa
    return mask + bias
