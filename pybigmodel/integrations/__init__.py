"""Other libraries' attention on this library's kernels; nothing is changed by the import."""

from pybigmodel.integrations._left import left_to_torch
from pybigmodel.integrations.torch_compile import register as _register_backend
from pybigmodel.integrations.torch_sdpa import Registration, register_sdpa, sdpa
from pybigmodel.integrations.transformers import register_transformers

__all__ = ["Registration", "left_to_torch", "register_sdpa", "register_transformers", "sdpa"]

_register_backend()
