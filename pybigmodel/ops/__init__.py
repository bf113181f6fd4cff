"""The ops: typed functions over ``torch.ops.pybigmodel``, one file per family."""

from pybigmodel.ops import _flops as _flops
from pybigmodel.ops.additive_attention import additive_attention
from pybigmodel.ops.attention import attention, attention_varlen
from pybigmodel.ops.attention_decode import attention_append_, attention_decode
from pybigmodel.ops.conv import (
    conv1d,
    conv2d,
    conv3d,
    conv_algorithm,
    conv_packed,
    pack_conv_weight,
)
from pybigmodel.ops.conv_transpose import conv_transpose1d, conv_transpose2d, conv_transpose3d
from pybigmodel.ops.int8_conv import (
    int8_conv,
    int8_conv2d,
    pack_int8_conv_weight,
)
from pybigmodel.ops.int8_linear import (
    int8_linear,
    int8_weight_only_linear,
    pack_int8_linear_weight,
    quantize_per_token,
    quantize_weight,
)
from pybigmodel.ops.linear import linear, linear_packed, pack_linear_weight
from pybigmodel.ops.pool import adaptive_avg_pool2d, avg_pool2d, max_pool2d

__all__ = [
    "adaptive_avg_pool2d",
    "additive_attention",
    "attention",
    "attention_append_",
    "attention_decode",
    "attention_varlen",
    "avg_pool2d",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_algorithm",
    "conv_packed",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "int8_conv",
    "int8_conv2d",
    "int8_linear",
    "int8_weight_only_linear",
    "linear",
    "linear_packed",
    "max_pool2d",
    "pack_conv_weight",
    "pack_int8_conv_weight",
    "pack_int8_linear_weight",
    "pack_linear_weight",
    "quantize_per_token",
    "quantize_weight",
]
