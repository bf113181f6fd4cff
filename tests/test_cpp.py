"""The torch-free C++ tests: built with ASan and UBSan, and run."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "tests-cpp"  # the Makefile's, which leaves nothing to build here
PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])


def run(*command: str | Path, timeout: float) -> str:
    done = subprocess.run(
        [str(c) for c in command],
        env=os.environ | {"PATH": PATH, "UBSAN_OPTIONS": "print_stacktrace=1"},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, (
        f"{command[0]} failed\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    )
    return done.stdout


@pytest.fixture(scope="module")
def programs() -> Path:
    missing = [tool for tool in ("cmake", "ninja", "c++") if not shutil.which(tool, path=PATH)]
    if missing:
        pytest.skip(f"{', '.join(missing)} not found; `make test` installs them")
    options = ["-DPYBIGMODEL_TESTS_ONLY=ON", "-DPYBIGMODEL_SANITIZE=ON"]
    run("cmake", "-S", ROOT, "-B", BUILD, "-G", "Ninja", *options, timeout=120)
    run("cmake", "--build", BUILD, timeout=900)
    return BUILD / "tests" / "cpp"


def test_programs(programs: Path) -> None:
    """Every test_*.cpp, on every tier of this CPU; the CUDA kernels' own source on a simulator."""
    out = "".join(run(program, timeout=600) for program in sorted(programs.glob("*_tests")))
    for source in (ROOT / "tests" / "cpp").glob("test_*.cpp"):
        assert re.search(rf"^{source.stem.removeprefix('test_')} +ok", out, re.MULTILINE), source


def test_sanitizers_are_in(programs: Path) -> None:
    for program in programs.glob("*_tests"):
        symbols = run("nm", program, timeout=60)
        assert "__asan_init" in symbols and "__ubsan_handle" in symbols


def test_an_unknown_group_is_an_error(programs: Path) -> None:
    done = subprocess.run([programs / "kernel_tests", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "unknown group" in done.stderr
