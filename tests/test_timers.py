"""pybigmodel.testing.timers: turns, and which of them count."""

from __future__ import annotations

import time
from collections.abc import Iterator
from itertools import chain, repeat

from pybigmodel.testing.timers import Timing, interleave

SECONDS = 1e-4


def timed(readings: Iterator[float], rounds: int = 3) -> tuple[dict[str, Timing], int]:
    """Two contenders, and how many rounds they took."""
    done = 0

    def count() -> None:
        nonlocal done
        done += 1

    timings = interleave(
        {"a": [lambda: None], "b": [lambda: None]},
        rounds=rounds,
        seconds=SECONDS,
        between=count,
        speed=lambda: next(readings),
        require_idle=False,
    )
    return timings, done


def speeds(timing: Timing) -> list[float]:
    return [turn.speed for turn in timing.turns]


def test_a_steady_machine_takes_as_many_rounds_as_asked() -> None:
    timings, rounds = timed(repeat(10.0))
    assert rounds == 3
    assert all(speeds(timing) == [10.0] * 3 for timing in timings.values())


def test_slow_turns_are_replaced() -> None:
    # A round of two turns takes three readings: the first round is slow, the second half of it.
    readings = chain([5.0, 5.0, 5.0], [9.5, 9.5, 5.0], repeat(10.0))
    timings, rounds = timed(readings)
    assert rounds == 5
    assert all(min(speeds(timing)) >= 9.0 and len(timing.turns) == 3 for timing in timings.values())


def test_a_machine_that_never_settles_takes_three_times_as_many_rounds_at_most() -> None:
    readings = chain.from_iterable(repeat([10.0, 5.0, 10.0]))
    timings, rounds = timed(readings)
    assert rounds == 9
    assert all(len(timing.turns) == 3 for timing in timings.values())


def test_without_a_probe_every_turn_counts() -> None:
    calls = {"a": [lambda: None], "b": [lambda: None]}
    timings = interleave(calls, rounds=4, seconds=SECONDS, require_idle=False)
    assert all(len(timing.turn_medians) == 4 for timing in timings.values())
    assert all(timing.wall_seconds >= 4 * SECONDS for timing in timings.values())


def test_a_contender_is_prepared_before_each_turn_outside_of_its_time() -> None:
    done = []
    timings = interleave(
        {"a": [lambda: done.append("call")], "b": [lambda: None]},
        rounds=3,
        seconds=SECONDS,
        prepare={"a": lambda: (time.sleep(0.05), done.append("prepared"))},
        require_idle=False,
    )
    turns = "".join("p" if what == "prepared" else "." for what in done).split("p")
    assert turns[0] == "" and len(turns) == 4 and all(turns[1:])
    assert timings["a"].wall_seconds < 0.05
