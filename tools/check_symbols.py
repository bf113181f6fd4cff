"""What a built library asks of its surroundings, compared with what it may ask.

One wheel serves every torch from 2.10 on only while the op libraries use nothing of torch but the
stable C shims, and it runs on other machines only while no path of this one is in it. For each
library, checked with readelf: the undefined symbols, the libraries named as needed, and RPATH.

Usage: check_symbols.py FILE...        FILE: a .so, a wheel or a folder
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Symbols with a version belong to the library that defines this version. GOMP_ and OMP_ are not
# here: a second OpenMP runtime beside torch's would fight it for the cores.
VERSIONS = re.compile(r"(GLIBC|GLIBCXX|CXXABI|GCC)_[0-9.]+")
LINKER = re.compile(r"__gmon_start__|_ITM_\w+|__cxa_finalize|__tls_get_addr")
STABLE_SHIMS = re.compile(r"(aoti_torch|torch)_\w+")
PYTHON_API = re.compile(r"_?Py\w+")
OWN_INTERFACE = re.compile(r"_ZNK?3pbm\w+")

SYSTEM_LIBRARIES = re.compile(
    r"(libc|libm|libdl|librt|libpthread|libgcc_s|libstdc\+\+)\.so\.\d+|ld-linux-.*"
)

# library name pattern: (unversioned undefined symbols, needed libraries beyond the system's)
ALLOWED = {
    r"libpybigmodel_cpu\.so": (STABLE_SHIMS, re.compile(r"libtorch_cpu\.so")),
    r"libpybigmodel_cuda\.so": (STABLE_SHIMS, re.compile(r"libtorch_(cpu|cuda)\.so")),
    r"_native\..*\.so": (
        re.compile(f"{PYTHON_API.pattern}|{OWN_INTERFACE.pattern}"),
        re.compile(r"libpybigmodel_cpu\.so"),
    ),
}


def readelf(option: str, library: Path) -> str:
    return subprocess.run(
        ["readelf", "--wide", option, str(library)], check=True, capture_output=True, text=True
    ).stdout


def undefined_symbols(library: Path) -> list[str]:
    """Names with their versions, as `memcpy@GLIBC_2.14`; without one where they have none."""
    # Num: Value Size Type Bind Vis Ndx Name [(version index)]
    rows = (line.split() for line in readelf("--dyn-syms", library).splitlines())
    return sorted(row[7] for row in rows if len(row) >= 8 and row[6] == "UND")


def dynamic_entries(library: Path, tag: str) -> list[str]:
    return re.findall(rf"\({tag}\).*\[(.*)\]", readelf("--dynamic", library))


def violations(library: Path) -> list[str]:
    """What is wrong with one library, a line each."""
    rules = [rule for pattern, rule in ALLOWED.items() if re.fullmatch(pattern, library.name)]
    if not rules:
        return [f"{library.name}: expected one of {', '.join(ALLOWED)}"]
    symbols, libraries = rules[0]
    found = []
    for symbol in undefined_symbols(library):
        name, _, version = symbol.partition("@")
        allowed = VERSIONS.fullmatch(version) if version else LINKER.fullmatch(name)
        if not (allowed or (not version and symbols.fullmatch(name))):
            found.append(f"{library.name}: undefined symbol {symbol} is no stable shim of torch")
    for needed in dynamic_entries(library, "NEEDED"):
        if not (SYSTEM_LIBRARIES.fullmatch(needed) or libraries.fullmatch(needed)):
            found.append(f"{library.name}: needs {needed}, which is not in every installation")
    for path in dynamic_entries(library, "RPATH|RUNPATH"):
        if path != "$ORIGIN":
            found.append(f"{library.name}: RPATH is {path}, only $ORIGIN holds on other machines")
    return found


@contextmanager
def libraries_in(path: Path) -> Iterator[list[Path]]:
    """The shared libraries in a wheel or a folder, or the one library that `path` is."""
    if path.suffix == ".whl":
        with tempfile.TemporaryDirectory() as folder:
            zipfile.ZipFile(path).extractall(folder)
            yield sorted(Path(folder).rglob("*.so"))
    else:
        yield sorted(path.glob("*.so")) if path.is_dir() else [path]


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__, file=sys.stderr)
        return 2
    wrong = 0
    for argument in arguments:
        with libraries_in(Path(argument)) as libraries:
            if not libraries:
                print(f"{argument}: expected shared libraries, found none", file=sys.stderr)
                wrong += 1
            for library in libraries:
                problems = violations(library)
                wrong += len(problems)
                for problem in problems:
                    print(problem, file=sys.stderr)
                if not problems:
                    count = len(undefined_symbols(library))
                    print(
                        f"{library.name}: {count} undefined symbols, all allowed", file=sys.stderr
                    )
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
