"""torch.compile knows the name "pybigmodel": by an entry point, or by the import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pybigmodel as pbm

PACKAGE = Path(pbm.__file__).parent
INSTALLED = "site-packages" in PACKAGE.parts

COMPILE = """
import torch
layer, x = torch.nn.Linear(6, 5), torch.randn(3, 6)
{before}
calls = []
import torch._inductor as inductor
def compile(module, inputs, options=None):
    calls.append([str(node.target) for node in module.graph.nodes])
    return module.forward
inductor.compile = compile
with torch.no_grad():
    y = torch.compile(layer, backend="pybigmodel")(x)
assert torch.allclose(y, layer(x), atol=1e-5)
assert "pybigmodel.linear_packed.default" in calls[0], calls
assert torch._dynamo.list_backends().count("pybigmodel") == 1
"""
BEFORE = {
    "nothing": "",
    "imported": "import pybigmodel",
    "imported after the compiler": "import torch._dynamo; import pybigmodel",
    "imported after the search": (
        "import torch._dynamo; torch._dynamo.list_backends(); import pybigmodel"
    ),
    "listed first": "assert 'pybigmodel' in torch._dynamo.list_backends()",
}


def run_python(code: str, *path: Path) -> None:
    inherited = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    path += () if INSTALLED else (PACKAGE.parent,)
    environment = inherited | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        cwd="/",
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What puts the entry point of pyproject.toml beside a package that is not installed."""
    if INSTALLED:
        return []
    folder = tmp_path_factory.mktemp("site")
    info = folder / f"pybigmodel-{pbm.__version__}.dist-info"
    info.mkdir()
    text = (PACKAGE.parent / "pyproject.toml").read_text()
    found = re.search(r"\[project.entry-points.torch_dynamo_backends\]\n(.+\n)", text)
    assert found is not None
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: pybigmodel\nVersion: {pbm.__version__}\n"
    )
    (info / "entry_points.txt").write_text("[torch_dynamo_backends]\n" + found[1].replace('"', ""))
    return [folder]


@pytest.mark.parametrize("before", BEFORE)
def test_torch_finds_the_name(before: str, installed: list[Path]) -> None:
    run_python(COMPILE.format(before=BEFORE[before]), *installed)


@pytest.mark.parametrize("before", [name for name in BEFORE if name.startswith("imported")])
def test_an_import_is_enough(before: str) -> None:
    run_python(COMPILE.format(before=BEFORE[before]))


def test_the_import_leaves_the_compiler_alone() -> None:
    run_python(
        "import sys, pybigmodel;"
        "assert not {'torch._dynamo', 'torch._inductor', 'pybigmodel._graph'} & set(sys.modules)"
    )
