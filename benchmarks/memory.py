"""What a call adds to the memory of the process, seen from outside of every allocator."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

_PROCESS = Path("/proc/self")
_RESET_PEAK = "5"  # see proc_pid_clear_refs(5)


def of_own_process(function: Callable[..., int], *arguments: object) -> int:
    """What the function returns in a process that has not done anything yet."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        return processes.submit(function, *arguments).result()


def peak_of(call: Callable[[], object]) -> int:
    """Bytes by which the resident memory is larger at the peak of `call` than before it.

    Its output counts. What earlier calls left in the allocator is given back first; what a library
    has kept for itself from them (an arena, a thread's scratch) is not seen: see `of_own_process`.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    (_PROCESS / "clear_refs").write_text(_RESET_PEAK)
    before = _resident("VmRSS")
    kept = call()
    peak = _resident("VmHWM")
    del kept
    return max(0, peak - before)


def _resident(key: str) -> int:
    for line in (_PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"expected {key} in {_PROCESS / 'status'}")
