"""Importing the package: lean, loud when something is missing, and obedient to its environment."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import pybigmodel
from pybigmodel import _native

PACKAGE = Path(pybigmodel.__file__).parent
OPTIONAL = ("transformers", "onnx", "onnxruntime", "openvino", "torchao", "rich", "triton", "scipy")


def python(
    code: str, path: Path | None = None, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter with a clean choice of tier; `path` first on its sys.path."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYBIGMODEL_")}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    return subprocess.run(
        [sys.executable, "-c", code],
        env=inherited | environment,
        capture_output=True,
        text=True,
        cwd="/",
    )


def test_import_is_lean() -> None:
    done = python(
        "import sys, torch; before = set(sys.modules); import pybigmodel, json;"
        "print(json.dumps(sorted({m.partition('.')[0] for m in set(sys.modules) - before})))",
    )
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stdout)) & set(OPTIONAL)


def test_no_command_imports_an_extra_before_it_runs() -> None:
    done = python(
        "import sys, json; from pybigmodel import cli; cli._parser();"
        f"print(json.dumps([m for m in {OPTIONAL!r} if m in sys.modules]))"
    )
    assert done.returncode == 0, done.stderr
    assert not set(json.loads(done.stdout)) - {"triton"}  # torch itself imports triton


def test_cuda_library_is_not_loaded_beside_a_torch_without_cuda() -> None:
    done = python(
        "import pybigmodel, torch; maps = open('/proc/self/maps').read();"
        "print(torch.version.cuda is not None, 'libpybigmodel_cuda' in maps)"
    )
    assert done.returncode == 0, done.stderr
    has_cuda, loaded = done.stdout.split()
    assert has_cuda == "True" or loaded == "False"


def copy_of_package(folder: Path) -> Path:
    shutil.copytree(PACKAGE, folder / "pybigmodel", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "pybigmodel"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda library: library.unlink(), "libpybigmodel_cpu.so is missing"),
        (lambda library: library.write_bytes(b"not a library"), "does not load beside torch"),
    ],
    ids=["missing", "damaged"],
)
def test_a_library_that_does_not_load_is_an_import_error(damage, message, tmp_path: Path) -> None:
    damage(copy_of_package(tmp_path) / "libpybigmodel_cpu.so")
    done = python("import pybigmodel", path=tmp_path)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: pybigmodel: ")
    assert message in last
    assert "pip install --force-reinstall pybigmodel" in last


def test_unknown_isa_is_an_import_error() -> None:
    done = python("import pybigmodel", PYBIGMODEL_ISA="sse9")
    assert done.returncode != 0
    assert "PYBIGMODEL_ISA=sse9" in done.stderr
    assert "scalar, avx2, avx512, avx512_bf16" in done.stderr


@pytest.mark.parametrize("isa", _native.available_isas())
def test_forced_isa_runs(isa: str) -> None:
    done = python(
        "import torch, pybigmodel as p; p.ops.linear(torch.ones(3, 5), torch.ones(7, 5));"
        "print(p._native.active_isa(), p._native.last_kernel())",
        PYBIGMODEL_ISA=isa,
    )
    assert done.returncode == 0, done.stderr
    active, kernel = done.stdout.split()
    assert active == isa
    assert kernel.partition(".")[2] == isa


def test_isa_that_the_cpu_lacks_is_an_error() -> None:
    known = ("scalar", "avx2", "avx512", "avx512_bf16")
    lacking = [isa for isa in known if isa not in _native.available_isas()]
    if not lacking:
        pytest.skip("this CPU has every tier")
    done = python("import pybigmodel", PYBIGMODEL_ISA=lacking[0])
    assert done.returncode != 0
    assert f"this CPU cannot run the '{lacking[0]}' kernels" in done.stderr


def test_log_level_from_the_environment() -> None:
    done = python(
        "import logging, pybigmodel; print(logging.getLogger('pybigmodel').level)",
        PYBIGMODEL_LOG="debug",
    )
    assert (done.returncode, done.stdout.strip()) == (0, "10")
