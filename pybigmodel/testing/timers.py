"""Timing several implementations side by side in one process.

What makes the figures comparable: the contenders take turns, so that a slow drift of the machine
meets all of them; each turn starts only when the process is idle, because some runtimes' worker
threads spin for tens of milliseconds after a call and take a core from whatever runs next; each
turn warms up before it counts; and the CPU time spent per wall time is kept as evidence.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, islice

Call = Callable[[], object]


@dataclass
class Timing:
    """Seconds per call, one entry a sample; a sample of short calls is the mean of many."""

    samples: list[float] = field(default_factory=list)
    turn_medians: list[float] = field(default_factory=list)
    cpu_seconds: float = 0.0
    wall_seconds: float = 0.0

    @property
    def median(self) -> float:
        return self.percentile(50)

    @property
    def cpu_over_wall(self) -> float:
        """Cores busy in this process while timing; above the thread count, someone was spinning."""
        return self.cpu_seconds / self.wall_seconds

    def percentile(self, q: float) -> float:
        """The q-th percentile (0 to 100) of the samples, linear between neighbours."""
        ordered = sorted(self.samples)
        at = (len(ordered) - 1) * q / 100
        low = int(at)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


def wait_until_idle(timeout: float = 2.0, window: float = 0.004, share: float = 0.05) -> float:
    """Sleep until this process used less than `share` of one core over `window` seconds.

    Returns the seconds waited. Raises TimeoutError after `timeout` seconds.
    """
    start = time.perf_counter()
    while True:
        wall, cpu = time.perf_counter(), time.process_time()
        time.sleep(window)
        busy = (time.process_time() - cpu) / (time.perf_counter() - wall)
        waited = time.perf_counter() - start
        if busy < share:
            return waited
        if waited > timeout:
            raise TimeoutError(
                f"the process should become idle (below {share:.0%} of a core) within {timeout} s, "
                f"but its threads still use {busy:.0%}"
            )


def settle(*, require_idle: bool) -> None:
    """Before a turn: wait until the process is idle; at most 0.1 s where it need not be."""
    if require_idle:
        wait_until_idle()
    else:
        with suppress(TimeoutError):
            wait_until_idle(timeout=0.1)


class Turns:
    """One contender's calls, timed turn by turn.

    `calls` are equivalent calls on different data (copies of a weight, say), taken in rotation
    across all turns, so that a rotation larger than a cache is never found in it.
    """

    # Long against the 0.1 µs that reading the clock takes, short against a scheduler's time slice.
    sample_seconds = 200e-6

    def __init__(self, calls: Sequence[Call]) -> None:
        if not calls:
            raise ValueError("calls: expected at least one callable, got none")
        self._rotation = len(calls)
        self._calls = cycle(calls)
        self._calls_per_sample = 0
        self.timing = Timing()

    def take(self, seconds: float) -> None:
        """Warm up, then sample for `seconds` (at least one sample, two in the first turn)."""
        self._warm_up(seconds)
        timing, calls, inner = self.timing, self._calls, self._calls_per_sample
        earlier = len(timing.samples)
        clock = time.perf_counter
        cpu_start, start = time.process_time(), clock()
        while True:
            begin = clock()
            for call in islice(calls, inner):
                call()
            end = clock()
            timing.samples.append((end - begin) / inner)
            if end - start >= seconds and len(timing.samples) >= 2:
                break
        timing.wall_seconds += clock() - start
        timing.cpu_seconds += time.process_time() - cpu_start
        timing.turn_medians.append(statistics.median(timing.samples[earlier:]))

    def _warm_up(self, seconds: float) -> None:
        # Small rotations are gone through once, so that what should lie in a cache does.
        start = time.perf_counter()
        done = 0
        while done < min(self._rotation, 8) or time.perf_counter() - start < seconds / 4:
            next(self._calls)()
            done += 1
        if self._calls_per_sample == 0:
            per_call = (time.perf_counter() - start) / done
            self._calls_per_sample = max(1, round(self.sample_seconds / per_call))


def interleave(
    contenders: Mapping[str, Sequence[Call]],
    *,
    rounds: int = 5,
    seconds: float = 0.03,
    between: Call | None = None,
    require_idle: bool = True,
) -> dict[str, Timing]:
    """Time every contender in `rounds` rounds, `seconds` a turn, each round in another order.

    `between` is called once a round when the process is idle: the place for a probe of the machine.
    Garbage collection is off meanwhile. A process whose other threads never rest raises
    TimeoutError after 2 s; with require_idle=False each turn begins after 0.1 s all the same.
    """
    turns = {name: Turns(calls) for name, calls in contenders.items()}
    names = list(turns)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds):
            if between is not None:
                settle(require_idle=require_idle)
                between()
            for i in range(len(names)):
                settle(require_idle=require_idle)
                turns[names[(i + r) % len(names)]].take(seconds)
    finally:
        if collecting:
            gc.enable()
    return {name: turn.timing for name, turn in turns.items()}
