"""What this machine can do at most, measured: arithmetic peaks and read bandwidth per cache level.

The probes run in `_native` on the active ISA tier, one Python thread per core (they release the
GIL), and what the threads reach at the same time is added up.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Barrier
from typing import Literal

from pybigmodel import _native

PeakKind = Literal["fp32", "bf16", "int8"]
Level = Literal["L1", "L2", "L3", "DRAM"]

_CPU0_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


@dataclass(frozen=True)
class CacheSizes:
    """Bytes: l1d and l2 of one core, l3 of the domain that core 0 belongs to (0 where absent)."""

    l1d: int
    l2: int
    l3: int


@cache
def cache_sizes(root: Path = _CPU0_CACHES) -> CacheSizes:
    """The cache sizes that Linux reports for core 0."""
    found: dict[int, int] = {}
    for index in sorted(root.glob("index*")):
        if (index / "type").read_text().strip() != "Instruction":
            size = (index / "size").read_text().strip()  # "48K"
            found[int((index / "level").read_text())] = int(size.removesuffix("K")) * 1024
    if 1 not in found:
        raise RuntimeError(f"expected the cache sizes under {root}, found {found or 'none'}")
    return CacheSizes(found[1], found.get(2, 0), found.get(3, 0))


def level_of(bytes_per_thread: int, threads: int = 1) -> Level | None:
    """The cache level that holds `bytes_per_thread` in each of `threads` threads.

    A level is named only where it is beyond doubt, None elsewhere: at most 3/4 of the level that
    holds it, so much more than the level above that cycling through it finds little there.
    """
    sizes = cache_sizes()
    total = bytes_per_thread * threads
    if bytes_per_thread <= sizes.l1d // 2:
        return "L1"
    if sizes.l1d * 4 <= bytes_per_thread <= sizes.l2 * 3 // 4:
        return "L2"
    if sizes.l3 and sizes.l2 * 2 <= bytes_per_thread and total <= sizes.l3 * 3 // 4:
        return "L3"
    if total >= max(sizes.l3, sizes.l2 * threads) * 4:
        return "DRAM"
    return None


def probe_bytes(level: Level, threads: int = 1) -> int:
    """Bytes per thread that a bandwidth probe of `level` reads."""
    sizes = cache_sizes()
    if level == "L1":
        return sizes.l1d // 2
    if level == "L2":
        return sizes.l2 // 2
    if level == "L3":
        if not sizes.l3:
            raise ValueError("level: expected a level that this CPU has, got 'L3'")
        return max(sizes.l3 // 4 // threads, sizes.l2 * 2)
    return max(sizes.l3, sizes.l2 * threads) * 4 // threads


def peak(kind: PeakKind, threads: int = 1, seconds: float = 0.02) -> float:
    """Operations a second from registers, a multiply-add being two, summed over `threads`."""
    return _sum_over_threads(lambda: _native.measure_peak(kind, seconds), threads)


def read_bandwidth(level: Level, threads: int = 1, seconds: float = 0.02) -> float:
    """Bytes a second read from `level`, summed over `threads`, each with a buffer of its own."""
    size = probe_bytes(level, threads)
    return _sum_over_threads(lambda: _native.measure_read_bandwidth(size, seconds), threads)


def _sum_over_threads(probe: Callable[[], float], threads: int) -> float:
    if threads < 1:
        raise ValueError(f"threads: expected at least 1, got {threads}")
    start = Barrier(threads)

    def one() -> float:
        start.wait()
        return probe()

    with ThreadPoolExecutor(threads) as pool:
        return sum(future.result() for future in [pool.submit(one) for _ in range(threads)])
