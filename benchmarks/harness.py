"""Measures one group: all providers of a problem, interleaved with the roofline probe."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import cast

import memory
import peers
import torch
from peers import Contender, Unavailable
from problem import Problem
from record import Row, commit, cpu_model

from pybigmodel import _native
from pybigmodel._console import OtherLoad
from pybigmodel.testing import force_isa, roofline
from pybigmodel.testing.timers import STEADY, Timing, interleave

Builder = Callable[[str, Problem], Contender]


@dataclass(frozen=True)
class Effort:
    """How long to measure: `rounds` turns of `seconds` for each provider."""

    rounds: int = 5
    seconds: float = 0.03


@dataclass(frozen=True)
class Measured:
    row: Row
    timing: Timing


class Probe:
    """The machine's limits for one problem: once a round, and its speed before each turn."""

    def __init__(self, problem: Problem, precisions: Iterable[str]) -> None:
        self._problem = problem
        self._peaks: dict[str, list[float]] = {precision: [] for precision in precisions}
        self._bandwidths: list[float] = []

    def __call__(self) -> None:
        p = self._problem
        for kind, peaks in self._peaks.items():
            peaks.append(roofline.peak(cast(roofline.PeakKind, kind), p.threads, 0.005))
        if p.level is not None:
            self._bandwidths.append(roofline.read_bandwidth(p.level, p.threads, 0.015))

    def speed(self) -> float:
        return roofline.peak("fp32", self._problem.threads, 0.003)

    def peak(self, precision: str) -> float:
        """The median of the readings at about the machine's full speed, as of turns that count."""
        best = max(self._peaks[precision])
        return statistics.median(x for x in self._peaks[precision] if x >= STEADY * best)

    @property
    def bandwidth(self) -> float | None:
        return statistics.median(self._bandwidths) if self._bandwidths else None


class Group:
    """The measurements of one problem by provider name.

    `unavailable` holds the reasons by provider; `suspect` says what speaks against the figures.
    """

    def __init__(
        self, problem: Problem, providers: Sequence[str], build: Builder, effort: Effort
    ) -> None:
        self.measured: dict[str, Measured] = {}
        self.unavailable: dict[str, str] = {}
        self.suspect: list[str] = []
        with _conditions(problem):
            self._measure(problem, providers, build, effort)

    def _measure(
        self, problem: Problem, providers: Sequence[str], build: Builder, effort: Effort
    ) -> None:
        contenders: dict[str, Contender] = {}
        for name in providers:
            try:
                contenders[name] = build(name, problem)
            except Unavailable as reason:
                self.unavailable[name] = str(reason)
        if not contenders:
            return
        date = datetime.now(timezone.utc).isoformat(timespec="seconds")
        precisions = {c.precision or problem.precision for c in contenders.values()}
        probe, load = Probe(problem, sorted(precisions)), OtherLoad()
        timings = interleave(
            {name: contender.calls for name, contender in contenders.items()},
            rounds=effort.rounds,
            seconds=effort.seconds,
            between=probe,
            speed=probe.speed,
            prepare={name: c.prepare for name, c in contenders.items() if c.prepare is not None},
        )
        others = load.cores()
        for name, timing in timings.items():
            # Other threads' time is accounted in ticks of up to 4 ms, at both ends of a turn.
            allowed = (problem.threads + 0.1) * timing.wall_seconds + 0.008 * effort.rounds
            if timing.cpu_seconds > allowed:
                self.suspect.append(
                    f"{problem} {name}: {timing.cpu_over_wall:.2f} cores busy for "
                    f"{problem.threads} threads: someone else's workers were spinning"
                )
        speeds = [turn.speed for timing in timings.values() for turn in timing.turns]
        if min(speeds) < STEADY * max(speeds):
            self.suspect.append(
                f"{problem}: the machine's speed varied {max(speeds) / min(speeds):.2f}× meanwhile"
            )
        if others > OtherLoad.ENOUGH_TO_MATTER:
            self.suspect.append(f"{problem}: other processes used {others:.2f} cores meanwhile")
        for name, timing in timings.items():
            peak = None
            if contenders[name].records_memory:
                peak = memory.of_own_process(_peak_bytes, build, name, replace(problem))
            row = _row(problem, name, contenders[name], timing, probe, peak, date, others)
            self.measured[name] = Measured(row, timing)


@contextmanager
def _conditions(problem: Problem) -> Iterator[None]:
    """Threads and tier of the problem, without gradients."""
    before = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, before)
        torch.set_num_threads(problem.threads)
        if problem.isa is not None:
            stack.enter_context(force_isa(problem.isa))
        stack.enter_context(torch.no_grad())
        yield


def _peak_bytes(build: Builder, name: str, problem: Problem) -> int:
    """Of the process's first call of this size, so that what is kept for the next one counts.

    After a small one, so that code, threads and tables, which come once, do not.
    """
    with _conditions(problem):
        build(name, problem.small).calls[0]()
        return memory.peak_of(build(name, problem).calls[0])


def _row(
    problem: Problem,
    name: str,
    contender: Contender,
    timing: Timing,
    probe: Probe,
    peak_bytes: int | None,
    date: str,
    others: float,
) -> Row:
    seconds = timing.median
    operations = (contender.operations or problem.operations) / seconds
    precision = contender.precision or problem.precision
    peak = probe.peak(precision)
    streamed = contender.streamed_bytes
    # What a peer holds in another precision may lie in another level, unless it says otherwise.
    if streamed is None and precision == problem.precision:
        streamed = problem.streamed_bytes
    bandwidth = None if streamed is None else probe.bandwidth
    read = streamed / seconds if streamed and bandwidth else None
    errors = contender.errors()
    m, n, k = problem.mnk or (None, None, None)
    return Row(
        group=str(problem),
        date=date,
        op=problem.op,
        precision=precision,
        m=m,
        n=n,
        k=k,
        shape=problem.shape,
        threads=problem.threads,
        weight_level=problem.level or "",
        weights_in_rotation=len(contender.calls),
        isa=_native.active_isa(),
        provider=name,
        provider_version=peers.version(name),
        median_us=seconds * 1e6,
        p20_us=timing.percentile(20) * 1e6,
        p80_us=timing.percentile(80) * 1e6,
        samples=len(timing.samples),
        gflops=operations / 1e9,
        peak_gflops=peak / 1e9,
        peak_fraction=operations / peak,
        read_gbps=read / 1e9 if read else None,
        level_gbps=bandwidth / 1e9 if bandwidth else None,
        bandwidth_fraction=read / bandwidth if read and bandwidth else None,
        rel_error=errors.relative,
        max_error=errors.largest,
        cosine=errors.cosine,
        agreement=errors.agreement,
        peak_bytes=peak_bytes,
        cpu_over_wall=timing.cpu_over_wall,
        other_load=others,
        cpu=cpu_model(),
        torch=torch.__version__,
        commit=commit(),
        note=contender.note,
    )
