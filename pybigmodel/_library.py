"""Loads the op libraries and applies the environment: the only place that does either.

Environment: ``PYBIGMODEL_ISA`` forces a tier of CPU kernels (scalar, avx2, avx512, avx512_bf16),
``PYBIGMODEL_LOG`` sets the level of the ``pybigmodel`` logger (debug, info, warning, error).
``PYBIGMODEL_CUDA`` belongs to the build.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch

_DIR = Path(__file__).parent
_REMEDY = (
    "Install a wheel built for this platform (pip install --force-reinstall pybigmodel), "
    "with torch >= 2.10 in the same environment."
)
log = logging.getLogger("pybigmodel")


def _load(name: str) -> None:
    path = _DIR / name
    if not path.exists():
        raise ImportError(f"pybigmodel: {name} is missing from {_DIR}. {_REMEDY}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"pybigmodel: {name} does not load beside torch {torch.__version__}: {error}. {_REMEDY}"
        ) from error


def load_libraries() -> bool:
    """Load the CPU ops and, beside a torch with CUDA, the CUDA ops; True if the latter were."""
    _load("libpybigmodel_cpu.so")
    from pybigmodel import _native  # needs the library above in the process

    level = os.environ.get("PYBIGMODEL_LOG")
    if level:
        log.setLevel(level.upper())
    isa = os.environ.get("PYBIGMODEL_ISA")
    if isa:
        try:
            _native.force_isa(isa)
        except (ValueError, RuntimeError) as error:
            raise ImportError(f"PYBIGMODEL_ISA={isa}: {error}") from error
    if torch.version.cuda is None or not (_DIR / "libpybigmodel_cuda.so").exists():
        return False
    _load("libpybigmodel_cuda.so")
    return True


CUDA_LOADED = load_libraries()
