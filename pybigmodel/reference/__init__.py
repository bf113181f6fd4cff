"""Every op in a few lines of plain PyTorch: the oracle of the tests, the explanation of the op."""

from pybigmodel.reference import additive_attention as additive_attention
from pybigmodel.reference import attention as attention
from pybigmodel.reference import attention_decode as attention_decode
from pybigmodel.reference import conv as conv
from pybigmodel.reference import linear as linear
