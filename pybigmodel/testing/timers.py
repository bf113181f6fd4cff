"""Timing several implementations side by side in one process.

What makes the figures comparable: the contenders take turns, so that a slow drift of the machine
meets all of them; each turn starts only when the process is idle, because some runtimes' worker
threads spin for tens of milliseconds after a call and take a core from whatever runs next; each
turn warms up before it counts; the CPU time spent per wall time is kept as evidence; and where a
shared machine slows down for seconds at a time, a probe before each turn says which turns count.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import cycle, islice

Call = Callable[[], object]


@dataclass
class Turn:
    """Seconds per call, one entry a sample; a sample of short calls is the mean of many."""

    samples: list[float]
    cpu_seconds: float
    wall_seconds: float
    speed: float = 0.0  # of the machine, the lower of the readings before and after


@dataclass
class Timing:
    """The turns of one contender that count."""

    turns: list[Turn] = field(default_factory=list)

    @property
    def samples(self) -> list[float]:
        return [sample for turn in self.turns for sample in turn.samples]

    @property
    def turn_medians(self) -> list[float]:
        return [statistics.median(turn.samples) for turn in self.turns]

    @property
    def wall_seconds(self) -> float:
        return sum(turn.wall_seconds for turn in self.turns)

    @property
    def cpu_seconds(self) -> float:
        return sum(turn.cpu_seconds for turn in self.turns)

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

    def take(self, seconds: float) -> Turn:
        """Warm up, then sample for `seconds` (at least one sample, two in the first turn)."""
        self._warm_up(seconds)
        calls, inner = self._calls, self._calls_per_sample
        samples: list[float] = []
        fewest = 1 if self.timing.turns else 2
        clock = time.perf_counter
        cpu_start, start = time.process_time(), clock()
        while True:
            begin = clock()
            for call in islice(calls, inner):
                call()
            end = clock()
            samples.append((end - begin) / inner)
            if end - start >= seconds and len(samples) >= fewest:
                break
        wall, cpu = clock() - start, time.process_time() - cpu_start
        turn = Turn(samples, cpu, wall)
        self.timing.turns.append(turn)
        return turn

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


# A shared core's other half takes up to half of it, for seconds at a time; clocks differ by less.
STEADY = 0.9


def _steady(contenders: Iterable[Turns], rounds: int, best: float) -> bool:
    """Whether each has `rounds` turns at about the highest speed seen."""
    speeds = [[turn.speed for turn in contender.timing.turns] for contender in contenders]
    return all(sum(speed >= STEADY * best for speed in of_one) >= rounds for of_one in speeds)


def interleave(
    contenders: Mapping[str, Sequence[Call]],
    *,
    rounds: int = 5,
    seconds: float = 0.03,
    between: Call | None = None,
    speed: Callable[[], float] | None = None,
    prepare: Mapping[str, Call] | None = None,
    require_idle: bool = True,
) -> dict[str, Timing]:
    """Time every contender in `rounds` rounds, `seconds` a turn, each round in another order.

    `between` is called once a round when the process is idle: the place for a probe of the machine.
    `prepare` has what to call before each turn of some contenders, to put back what their calls
    change. `speed` is called before each turn and says how fast the machine is just then. While a
    contender has fewer than `rounds` turns with readings of STEADY of the best on both sides,
    rounds are added, to three times as many; then the `rounds` turns with the highest readings
    count.
    Garbage collection is off meanwhile. A process whose other threads never rest raises
    TimeoutError after 2 s; with require_idle=False each turn begins after 0.1 s all the same.
    """

    best = 0.0

    def reading() -> float:
        nonlocal best
        settle(require_idle=require_idle)
        now = 0.0 if speed is None else speed()
        best = max(best, now)
        return now

    turns = {name: Turns(calls) for name, calls in contenders.items()}
    names = list(turns)
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for r in range(rounds if speed is None else 3 * rounds):
            if r >= rounds and _steady(turns.values(), rounds, best):
                break
            if between is not None:
                settle(require_idle=require_idle)
                between()
            before = reading()
            for i in range(len(names)):
                name = names[(i + r) % len(names)]
                if prepare is not None and name in prepare:
                    prepare[name]()
                    settle(require_idle=require_idle)
                turn = turns[name].take(seconds)
                after = reading()
                turn.speed = min(before, after)
                before = after
    finally:
        if collecting:
            gc.enable()
    for contender in turns.values():
        kept = sorted(contender.timing.turns, key=lambda turn: turn.speed, reverse=True)
        contender.timing.turns = kept[:rounds]
    return {name: turn.timing for name, turn in turns.items()}
