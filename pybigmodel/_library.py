"""Loads the op libraries and applies the environment: the only place that does either.

Environment: ``PYBIGMODEL_ISA`` forces a tier of CPU kernels (scalar, avx2, avx512, avx512_bf16),
``PYBIGMODEL_LOG`` sets the level of the ``pybigmodel`` logger (debug, info, warning, error)
and shows its messages on standard error.
``PYBIGMODEL_CUDA`` belongs to the build.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

import torch

_DIR = Path(__file__).parent
_LEVELS = ("debug", "info", "warning", "error")
log = logging.getLogger("pybigmodel")


def _remedy() -> str:
    if (_DIR.parent / "CMakeLists.txt").exists():
        return (
            f"This is pybigmodel's source tree, not the installed package: run Python outside "
            f"{_DIR.parent}, or build the libraries into it (make dev)."
        )
    return (
        "Install a wheel built for this platform (pip install --force-reinstall "
        "pybigmodel-*.whl), with torch >= 2.10 in the same environment."
    )


def _load(name: str) -> None:
    path = _DIR / name
    if not path.exists():
        raise ImportError(f"pybigmodel: {name} is missing from {_DIR}. {_remedy()}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise ImportError(
            f"pybigmodel: {name} does not load beside torch {torch.__version__}: {error}. "
            f"{_remedy()}"
        ) from error
    log.info("loaded %s", path)


def _start_log() -> None:
    level = os.environ.get("PYBIGMODEL_LOG")
    if not level:
        return
    if level.lower() not in _LEVELS:
        raise ImportError(f"PYBIGMODEL_LOG={level}: expected one of {', '.join(_LEVELS)}")
    log.setLevel(level.upper())
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(name)s %(levelname)s: %(message)s"))
    # An application that sets up logging gets the messages there, and only there.
    handler.addFilter(lambda _: not logging.getLogger().handlers)
    log.addHandler(handler)


def load_libraries() -> bool:
    """Load the CPU ops and, beside a torch with CUDA, the CUDA ops; True if the latter were."""
    _start_log()
    _load("libpybigmodel_cpu.so")
    from pybigmodel import _native  # needs the library above in the process

    isa = os.environ.get("PYBIGMODEL_ISA")
    if isa:
        try:
            _native.force_isa(isa)
        except (ValueError, RuntimeError) as error:
            raise ImportError(f"PYBIGMODEL_ISA={isa}: {error}") from error
    available = ", ".join(_native.available_isas())
    log.info("%s kernels; this CPU has %s", _native.active_isa(), available)
    if torch.version.cuda is None or not (_DIR / "libpybigmodel_cuda.so").exists():
        return False
    _load("libpybigmodel_cuda.so")
    return True


def _is_command() -> bool:
    """Whether the `pybigmodel` command imports this, which it does before its main can run."""
    program = Path(sys.argv[0]).name if sys.argv else ""
    return program == "pybigmodel" or (program == "-m" and "pybigmodel" in sys.orig_argv)


try:
    CUDA_LOADED = load_libraries()
except ImportError as error:
    if not _is_command():
        raise
    print(error, file=sys.stderr)
    raise SystemExit(2) from None
