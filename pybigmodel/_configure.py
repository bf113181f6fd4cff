"""Process-wide switches: explicit, off until asked for."""

from __future__ import annotations

from pybigmodel import _native


def configure(*, retain_memory: bool = False) -> None:
    """Set process-wide switches.

    Args:
        retain_memory: keep freed memory in the process instead of returning it to the kernel
            (glibc's ``M_MMAP_THRESHOLD`` and ``M_TRIM_THRESHOLD`` set to 1 GiB). Without it every
            output of more than a few MiB costs a page fault for each 4 KiB, at each call, in every
            op of torch's too. The process's memory then stays at its high-water mark. It holds
            until the process ends; ``False`` leaves things as they are.

    Raises:
        RuntimeError: the C library refused.
    """
    if retain_memory:
        _native.retain_memory()
