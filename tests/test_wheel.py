"""What is installed: a wheel that runs on other machines and beside other versions of torch."""

from __future__ import annotations

import importlib.util
import os
import re
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest

import pybigmodel

PACKAGE = Path(pybigmodel.__file__).parent
INSTALLED = "site-packages" in PACKAGE.parts
LIBRARIES = sorted(PACKAGE.glob("*.so"))


@pytest.fixture(scope="module")
def check_symbols() -> ModuleType:
    path = Path(__file__).parents[1] / "tools" / "check_symbols.py"
    spec = importlib.util.spec_from_file_location("check_symbols", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_installed_package_is_what_is_tested() -> None:
    if "PBM_TEST_INSTALLED" not in os.environ:
        pytest.skip("a run from the source tree; `make test` sets PBM_TEST_INSTALLED")
    assert INSTALLED, f"pybigmodel comes from {PACKAGE}, not from site-packages"


def test_libraries() -> None:
    names = {path.name.partition(".")[0] for path in LIBRARIES}
    assert (
        {"libpybigmodel_cpu", "_native"}
        <= names
        <= {
            "libpybigmodel_cpu",
            "libpybigmodel_cuda",
            "_native",
        }
    )


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name.partition(".")[0])
def test_only_stable_symbols(library: Path, check_symbols: ModuleType) -> None:
    problems = check_symbols.violations(library)
    if not INSTALLED:  # a library built into the tree keeps the build's RPATH
        problems = [p for p in problems if "RPATH" not in p]
    assert problems == []


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda p: p.name.partition(".")[0])
def test_no_symbol_of_aten_or_c10(library: Path, check_symbols: ModuleType) -> None:
    """Said again by name: these are the ones that change from one torch to the next."""
    symbols = check_symbols.undefined_symbols(library)
    assert symbols
    assert [s for s in symbols if re.search(r"2at|3c10|5torch", s)] == []


def test_the_check_sees_a_symbol_that_is_not_stable(check_symbols: ModuleType) -> None:
    """libtorch's own library, called ours: full of what must not be there."""
    import torch

    found = Path(torch.__path__[0]) / "lib" / "libtorch_python.so"
    symbols, libraries = check_symbols.ALLOWED[r"libpybigmodel_cpu\.so"]
    undefined = [s for s in check_symbols.undefined_symbols(found) if "@" not in s]
    assert any(not symbols.fullmatch(s) for s in undefined)
    needed = check_symbols.dynamic_entries(found, "NEEDED")
    assert any(not libraries.fullmatch(n) for n in needed)


@pytest.mark.skipif(not INSTALLED, reason="a source tree has no wheel tag")
def test_tag_is_honest() -> None:
    wheel = metadata.distribution("pybigmodel").read_text("WHEEL")
    assert wheel is not None
    tags = re.findall(r"^Tag: (.+)$", wheel, re.MULTILINE)
    assert tags
    for tag in tags:
        assert re.fullmatch(r"cp3\d+-cp3\d+-manylinux_2_\d+_x86_64", tag)
    assert "Root-Is-Purelib: false" in wheel


@pytest.mark.skipif(not INSTALLED, reason="a source tree has no metadata")
def test_metadata() -> None:
    fields = metadata.metadata("pybigmodel")
    assert fields["Version"] == pybigmodel.__version__
    assert fields["License-Expression"] == "Apache-2.0"
    assert "torch>=2.10" in (metadata.requires("pybigmodel") or [])
    assert (PACKAGE / "py.typed").exists()


@pytest.mark.skipif(not INSTALLED, reason="a source tree has no metadata")
def test_torch_compile_finds_the_backend() -> None:
    (found,) = metadata.entry_points(group="torch_dynamo_backends", name="pybigmodel")
    assert found.load() is pybigmodel.integrations.torch_compile.backend


@pytest.mark.skipif(not INSTALLED, reason="the source tree has sources")
def test_no_sources_in_the_wheel() -> None:
    allowed = {".py", ".pyi", ".so", ".typed", ".pyc"}
    extra = [p for p in PACKAGE.rglob("*") if p.is_file() and p.suffix not in allowed]
    assert [p for p in extra if p.name != "py.typed"] == []
