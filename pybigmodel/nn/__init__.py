"""Modules on this library's ops: drop-ins for torch's, and additive attention, which torch has
not."""

from pybigmodel.nn.additive_attention import AdditiveAttention
from pybigmodel.nn.conv import (
    Conv1d,
    Conv2d,
    Conv3d,
    ConvTranspose1d,
    ConvTranspose2d,
    ConvTranspose3d,
)
from pybigmodel.nn.conv_bn_act import ConvBnAct1d, ConvBnAct2d, ConvBnAct3d
from pybigmodel.nn.int8_conv import Int8Conv1d, Int8Conv2d, Int8Conv3d
from pybigmodel.nn.int8_linear import Int8Linear
from pybigmodel.nn.linear import Linear
from pybigmodel.nn.multihead_attention import MultiheadAttention
from pybigmodel.nn.pool import AdaptiveAvgPool2d, AvgPool2d, MaxPool2d
from pybigmodel.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "AdaptiveAvgPool2d",
    "AdditiveAttention",
    "AvgPool2d",
    "Conv1d",
    "Conv2d",
    "Conv3d",
    "ConvBnAct1d",
    "ConvBnAct2d",
    "ConvBnAct3d",
    "ConvTranspose1d",
    "ConvTranspose2d",
    "ConvTranspose3d",
    "Int8Conv1d",
    "Int8Conv2d",
    "Int8Conv3d",
    "Int8Linear",
    "Linear",
    "MaxPool2d",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
