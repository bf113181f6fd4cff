"""Drop-in modules: torch's constructors, state_dicts and hooks on this library's ops."""

from pybigmodel.nn.int8_linear import Int8Linear
from pybigmodel.nn.linear import Linear
from pybigmodel.nn.multihead_attention import MultiheadAttention

__all__ = ["Int8Linear", "Linear", "MultiheadAttention"]
