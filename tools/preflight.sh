#!/bin/sh
# What pip cannot install: tells what is missing and the Debian package that has it.
# Usage: preflight.sh [--gpu] PYTHON
set -u

gpu=no
if [ "$1" = --gpu ]; then
  gpu=yes
  shift
fi
python=$1
missing=0

need() {
  echo "pybigmodel: $1" >&2
  missing=1
}

if ! command -v "$python" >/dev/null; then
  need "no '$python' on PATH; install Python 3.10 or later (apt-get install python3), or name one: make PYTHON=/path/to/python3"
  exit 1
fi
version=$("$python" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || exit 1
if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))'; then
  need "$python is Python $version, but 3.10 or later is needed; name another: make PYTHON=/path/to/python3"
  exit 1
fi
if [ "$gpu" = no ] && ! "$python" -c 'import ensurepip, venv' 2>/dev/null; then
  need "Python $version has no venv module; install it: apt-get install python$version-venv"
fi
if ! "$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))'; then
  need "Python $version has no headers (Python.h); install them: apt-get install python$version-dev"
fi
cxx=${CXX:-g++}
if ! command -v "$cxx" >/dev/null; then
  need "no C++ compiler '$cxx'; install one (apt-get install g++), or name it: CXX=clang++ make ..."
elif ! printf '#if defined __GNUC__ && !defined __clang__ && __GNUC__ < 11\n#error\n#endif\n' |
  "$cxx" -x c++ -E - >/dev/null 2>&1; then
  need "$cxx is older than g++ 11, or does not work; name another: CXX=g++-11 make ..."
fi
if [ "$gpu" = yes ]; then
  command -v "${CUDACXX:-nvcc}" >/dev/null || need "no CUDA compiler '${CUDACXX:-nvcc}'; put nvcc on PATH or set CUDACXX"
  "$python" -c 'import torch, sys; sys.exit(not torch.cuda.is_available())' ||
    need "$python has no torch that sees a CUDA device; name one that has: make gpu PYTHON=/path/to/python3"
  for module in pybind11 pytest pytest_benchmark; do
    "$python" -c "import $module" 2>/dev/null || need "$python has no module $module; install it: $python -m pip install $module"
  done
  command -v cmake >/dev/null || need "no cmake; install it: $python -m pip install cmake"
fi
exit $missing
