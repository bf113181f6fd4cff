"""The ops: typed functions over ``torch.ops.pybigmodel``, one file per family."""

from pybigmodel.ops import _flops as _flops
from pybigmodel.ops.additive_attention import additive_attention
from pybigmodel.ops.attention import attention, attention_varlen
from pybigmodel.ops.attention_decode import attention_append_, attention_decode
from pybigmodel.ops.int8_linear import (
    int8_linear,
    int8_weight_only_linear,
    pack_int8_linear_weight,
    quantize_per_token,
    quantize_weight,
)
from pybigmodel.ops.linear import linear, linear_packed, pack_linear_weight

__all__ = [
    "additive_attention",
    "attention",
    "attention_append_",
    "attention_decode",
    "attention_varlen",
    "int8_linear",
    "int8_weight_only_linear",
    "linear",
    "linear_packed",
    "pack_int8_linear_weight",
    "pack_linear_weight",
    "quantize_per_token",
    "quantize_weight",
]
