"""Drop-in PyTorch layers on kernels of their own."""

from __future__ import annotations

from pybigmodel import _library as _library  # first: loads the ops
from pybigmodel import ops as ops

__version__ = "0.1.0"
