"""pytest-benchmark as the entry: each problem × provider is one benchmark, in one group a problem.

The first test of a problem measures all providers that are selected for it, interleaved; each
test then hands its provider's samples to pytest-benchmark through a clock that replays them.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import peers
import pytest
import record
from harness import Builder, Effort, Group
from problem import Problem

import pybigmodel

# For every provider alike: outputs of more than a few MiB would measure the kernel's page faults.
pybigmodel.configure(retain_memory=True)

# Seconds to compile, export or calibrate, each.
_QUICK_SKIPS = (
    "torch_compile",
    "torch_flex",
    "torchao_dynamic_compiled",
    "onnxruntime_int8",
    "openvino_int8",
)


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("pybigmodel benchmarks")
    group.addoption("--quick", action="store_true", help="a few small problems, in under a minute")
    group.addoption("--rounds", type=int, default=5, help="turns of each provider")
    group.addoption("--seconds", type=float, default=0.03, help="length of a turn")
    group.addoption(
        "--results",
        type=Path,
        default=None,
        help="folder for the CSV files, which then also gets groups with deselected providers "
        "(default: benchmarks/results; with --quick: none)",
    )


class ReplayClock:
    """A clock that moves only by the samples that it was given."""

    __name__ = "ReplayClock"

    def __init__(self) -> None:
        self._now = 0.0
        self._samples = iter(())

    def load(self, samples: list[float]) -> None:
        self._samples = iter(samples)

    def advance(self) -> None:
        self._now += next(self._samples)

    def __call__(self) -> float:
        return self._now


def _problem(item: pytest.Item) -> Problem | None:
    callspec = getattr(item, "callspec", None)
    return callspec.params.get("problem") if callspec else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("quick"):
        dropped = [item for item in items if not _is_quick(item)]
        items[:] = [item for item in items if _is_quick(item)]
        config.hook.pytest_deselected(items=dropped)
    # One thread first: ONNX Runtime has no way back from its process-wide pool (see its peer).
    items.sort(key=lambda item: problem.threads if (problem := _problem(item)) else 0)
    for item in items:
        if (problem := _problem(item)) is not None:
            item.add_marker(pytest.mark.benchmark(group=str(problem), timer=ReplayClock()))


def _is_quick(item: pytest.Item) -> bool:
    problem = _problem(item)
    if problem is None:
        return True
    callspec: Any = item.callspec  # type: ignore[attr-defined]
    return problem.quick and callspec.params["provider"] not in _QUICK_SKIPS


class Session:
    """The groups of one pytest session; only the latest is kept, since each is used in a row."""

    def __init__(self, config: pytest.Config) -> None:
        quick = config.getoption("quick")
        rounds, seconds = config.getoption("rounds"), config.getoption("seconds")
        self._effort = Effort(2, 0.01) if quick else Effort(rounds, seconds)
        chosen: Path | None = config.getoption("results")
        self._folder = chosen or (None if quick else record.RESULTS)
        self._record_partial = chosen is not None
        self._latest: tuple[Problem, Group | Exception] | None = None
        self.suspect: list[str] = []
        self.partial: set[str] = set()  # groups not recorded: some of their providers deselected
        self.deselected: set[tuple[str, str]] = set()  # (test function, group)

    def group(self, request: pytest.FixtureRequest, problem: Problem, build: Builder) -> Group:
        if self._latest is None or self._latest[0] is not problem:
            try:
                self._latest = (problem, self._run(request, problem, build))
            except Exception as failure:  # fails every test of the group, measured only once
                self._latest = (problem, failure)
        if isinstance(self._latest[1], Exception):
            raise self._latest[1]
        return self._latest[1]

    def _run(self, request: pytest.FixtureRequest, problem: Problem, build: Builder) -> Group:
        function = request.node.originalname
        providers = [
            item.callspec.params["provider"]
            for item in request.session.items
            if _problem(item) is problem
        ]
        group = Group(problem, providers, build, self._effort)
        problem.__dict__.pop("data", None)  # frees the tensors
        self.suspect += group.suspect
        if self._folder is not None:
            if (function, str(problem)) in self.deselected and not self._record_partial:
                self.partial.add(str(problem))
            else:
                file = Path(request.node.path).stem.removeprefix("bench_") + ".csv"
                record.write(self._folder / file, [m.row for m in group.measured.values()])
        return group


_SESSION = pytest.StashKey[Session]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.stash[_SESSION] = Session(config)


def pytest_deselected(items: list[pytest.Item]) -> None:
    for item in items:
        if (problem := _problem(item)) is not None:
            session = item.config.stash[_SESSION]
            session.deselected.add((item.originalname, str(problem)))  # type: ignore[attr-defined]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    session = config.stash[_SESSION]
    for line in session.suspect:
        terminalreporter.write_line(f"suspect: {line}")
    if session.partial:
        terminalreporter.write_line(
            f"{len(session.partial)} groups not recorded: some of their providers were deselected"
        )


@pytest.fixture
def measure(request: pytest.FixtureRequest, benchmark: Any) -> Any:
    """measure(problem, provider, build): the provider's Measured, from its group's run."""

    def run(problem: Problem, provider: str, build: Builder = peers.build) -> Any:
        group = request.config.stash[_SESSION].group(request, problem, build)
        if provider in group.unavailable:
            benchmark.skipped = True
            pytest.skip(f"{provider}: {group.unavailable[provider]}")
        measured = group.measured[provider]
        row = measured.row
        benchmark.extra_info.update(
            gflops=row.gflops, peak_fraction=row.peak_fraction, rel_error=row.rel_error
        )
        clock = request.node.get_closest_marker("benchmark").kwargs["timer"]
        clock.load(measured.timing.samples)
        benchmark.pedantic(clock.advance, rounds=len(measured.timing.samples))
        return measured

    return run
