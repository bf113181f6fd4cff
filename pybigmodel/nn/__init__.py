"""Drop-in modules: torch's constructors, state_dicts and hooks on this library's ops."""

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
    "Int8Linear",
    "Linear",
    "MultiheadAttention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
]
