"""Modules on this library's ops: drop-ins for torch's, and additive attention, which torch has
not."""

from pybigmodel.nn.additive_attention import AdditiveAttention
from pybigmodel.nn.int8_linear import Int8Linear
from pybigmodel.nn.linear import Linear
from pybigmodel.nn.multihead_attention import MultiheadAttention
from pybigmodel.nn.transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "AdditiveAttention",
    "Int8Linear",
    "Linear",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
