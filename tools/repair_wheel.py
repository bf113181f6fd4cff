"""Gives a wheel the manylinux tag that its symbols allow, and checks that it is what it claims.

auditwheel reads which glibc and libstdc++ versions the libraries need and tags accordingly. torch's
own libraries are left out: they come with torch and must be its own, whatever version it has.

Usage: repair_wheel.py WHEEL FOLDER        prints the path of the repaired wheel
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import check_symbols

EXCLUDED = ("libtorch.so", "libtorch_cpu.so", "libtorch_cuda.so", "libc10.so", "libc10_cuda.so")


def auditwheel(*arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "auditwheel", *arguments], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"auditwheel {' '.join(arguments)} failed:\n{done.stdout}{done.stderr}")
    return done.stdout


def check(wheel: Path) -> None:
    """Refuse a wheel whose tag is not what its symbols say, or into which libraries were copied."""
    facts = json.loads(auditwheel("show", "--json", str(wheel)))
    if not re.fullmatch(r"manylinux_\d+_\d+_x86_64", facts["sym_tag"]):
        raise SystemExit(f"{wheel.name}: expected symbols of a manylinux, got {facts['sym_tag']}")
    if facts["sym_tag"] not in wheel.stem.split("-")[-1].split("."):
        raise SystemExit(f"{wheel.name}: its symbols need {facts['sym_tag']}")
    external = set(facts["external_libs"]) - set(EXCLUDED)
    if external:
        raise SystemExit(f"{wheel.name}: needs {', '.join(sorted(external))}")
    names = zipfile.ZipFile(wheel).namelist()
    copied = [n for n in names if ".so" in n and not n.startswith("pybigmodel/")]
    if copied:
        raise SystemExit(f"{wheel.name}: libraries were copied into it: {', '.join(copied)}")
    if check_symbols.main([str(wheel)]):
        raise SystemExit(f"{wheel.name}: see above")
    print(f"{wheel.name}: the tag that its symbols allow, no library copied in", file=sys.stderr)


def main(arguments: list[str]) -> int:
    if len(arguments) != 2:
        print(__doc__, file=sys.stderr)
        return 2
    wheel, folder = Path(arguments[0]), Path(arguments[1])
    excludes = [word for name in EXCLUDED for word in ("--exclude", name)]
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        auditwheel("repair", str(wheel), "--wheel-dir", temporary, *excludes)
        repaired = next(Path(temporary).glob("*.whl"))
        check(repaired)
        # An older build of the same version for the same Python may bear another platform tag.
        for old in folder.glob("-".join(repaired.name.split("-")[:4]) + "-*.whl"):
            old.unlink()
        target = folder / repaired.name
        target.write_bytes(repaired.read_bytes())
    print(target)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
