"""The torch-free C++ tests: built with ASan and UBSan, and run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "tests-cpp"  # the one of `make test-cpp`, which leaves little to do here
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


def test_kernels(programs: Path) -> None:
    """Every group, on every tier of this CPU; another seed than the program's own."""
    out = run(programs / "kernel_tests", "--iterations", "60", "--seed", "2", timeout=600)
    for group in ("partition", "convert", "vecmath", "quantize", "pack", "brgemm", "gemm"):
        assert f"{group:10} ok" in out


def test_cuda_layout(programs: Path) -> None:
    """The CUDA kernels' own source on a simulator."""
    assert "ok" in run(programs / "cuda_layout_tests", timeout=600)


def test_sanitizers_are_in(programs: Path) -> None:
    for program in ("kernel_tests", "cuda_layout_tests"):
        symbols = run("nm", programs / program, timeout=60)
        assert "__asan_init" in symbols and "__ubsan_handle" in symbols


def test_an_unknown_group_is_an_error(programs: Path) -> None:
    done = subprocess.run([programs / "kernel_tests", "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "unknown group" in done.stderr
