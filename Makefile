# Every target sets up what it needs by itself: a virtual environment, torch, the build tools, the wheel.

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
PYBIGMODEL_CUDA ?= AUTO
ARGS ?=

BIN := $(abspath $(VENV))/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The installed wheel is what runs: a PYTHONPATH that names the tree would put the tree before it.
RUN := env -u PYTHONPATH PBM_TEST_INSTALLED=1
SOURCES := CMakeLists.txt pyproject.toml README.md LICENSE tools/repair_wheel.py tools/check_symbols.py \
  $(shell find csrc pybigmodel -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.c' \
    -o -name 'CMakeLists.txt' -o -name '*.py' -o -name '*.pyi' -o -name 'py.typed')
CPP_TESTS := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cuh' -o -name 'CMakeLists.txt')
CPP_FORMATTED := $(shell find csrc tests/cpp -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.c')

export PYBIGMODEL_CUDA
export PATH := $(BIN):$(PATH)

# pip cannot install twice at once into one environment, and ninja compiles in parallel by itself: with -j too, one
# recipe at a time, and no jobserver for ninja to join.
.NOTPARALLEL:
unexport MAKEFLAGS MFLAGS
.DELETE_ON_ERROR:
.SUFFIXES:
.DEFAULT_GOAL := help

.PHONY: help
help:
	@echo 'make demo     a sentence-embedding model with real weights, before and after pbm.optimize'
	@echo 'make test     the C++ tests under sanitizers, and the Python tests against the installed wheel'
	@echo 'make lint     ruff, mypy, clang-format, typos (make format: let ruff and clang-format mend)'
	@echo 'make bench    the benchmark suite; rows go to benchmarks/results'
	@echo 'make wheel    dist/*.whl, repaired and checked by auditwheel'
	@echo 'make sdist    dist/*.tar.gz, and a wheel built from it as proof'
	@echo 'make gpu      build with CUDA beside the torch of PYTHON; CUDA tests and benchmarks'
	@echo 'make dev      libraries built into the source tree, for PYTHONPATH=. $(VENV)/bin/python'
	@echo 'make clean    remove build/, dist/ and built libraries (distclean: and $(VENV))'
	@echo
	@echo 'Variables: PYTHON=$(PYTHON)  VENV=$(VENV)  TORCH=$(TORCH)  PYBIGMODEL_CUDA=$(PYBIGMODEL_CUDA) (AUTO, ON, OFF)'
	@echo '           ARGS: more arguments for pytest (test: paths are relative to tests/; bench; gpu) or for pybigmodel demo'

# --- what users and CI run ----------------------------------------------------------------------------------------
.PHONY: demo test test-cpp test-python bench
demo: $(STAMPS)/installed
	$(RUN) $(BIN)/pybigmodel demo $(ARGS)

test: build/tests-cpp/.built test-python

# Part of test-python too; without tests/conftest.py, which needs the wheel.
test-cpp: build/tests-cpp/.built $(STAMPS)/group-test
	cd tests && $(RUN) $(BIN)/pytest --noconftest test_cpp.py $(ARGS)

# From tests/, since `python -c` in a subprocess of a test puts the current directory on its path.
test-python: $(STAMPS)/installed $(STAMPS)/group-test
	cd tests && $(RUN) $(BIN)/pytest $(ARGS)

bench: $(STAMPS)/installed $(STAMPS)/group-bench
	$(RUN) $(BIN)/pytest benchmarks $(ARGS)

# --- environment --------------------------------------------------------------------------------------------------
$(STAMPS)/venv:
	sh tools/preflight.sh '$(PYTHON)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) 'pip>=25.1'
	mkdir -p $(STAMPS)
	touch $@

# Rewritten only when what they record changes, so that a new TORCH or PYBIGMODEL_CUDA rebuilds and the same does not.
$(STAMPS)/torch.spec: FORCE | $(STAMPS)/venv
	@echo '$(TORCH)' | cmp -s - $@ || echo '$(TORCH)' > $@
$(STAMPS)/build.spec: FORCE | $(STAMPS)/venv
	@echo 'cuda=$(PYBIGMODEL_CUDA)' | cmp -s - $@ || echo 'cuda=$(PYBIGMODEL_CUDA)' > $@
FORCE:

$(STAMPS)/torch: $(STAMPS)/torch.spec
	@echo 'Installing $(TORCH) (the largest download; TORCH=... or pip.conf choose another build)'
	$(PIP) '$(TORCH)'
	touch $@

# torch is named along, so that no dependency replaces it.
$(STAMPS)/group-%: pyproject.toml $(STAMPS)/torch
	$(PIP) '$(TORCH)' --group $*
	touch $@

# --- the wheel ----------------------------------------------------------------------------------------------------
.PHONY: wheel sdist
wheel: $(STAMPS)/wheel
	@cat $<

$(STAMPS)/wheel: $(SOURCES) $(STAMPS)/group-build $(STAMPS)/build.spec
	@echo 'Compiling the kernels (some minutes; nothing more is printed until it is done)'
	rm -rf build/wheel
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/wheel .
	$(BIN)/python tools/repair_wheel.py build/wheel/*.whl dist > $@.new
	mv $@.new $@

$(STAMPS)/installed: $(STAMPS)/wheel
	$(PIP) --force-reinstall --no-deps "$$(cat $<)"
	$(PIP) '$(TORCH)' "$$(cat $<)[demo]"
	touch $@

sdist: $(STAMPS)/group-build
	rm -rf build/sdist
	$(BIN)/python -m build --sdist --no-isolation --outdir build/sdist .
	$(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir build/sdist build/sdist/*.tar.gz
	mkdir -p dist
	cp build/sdist/*.tar.gz dist/
	@ls dist/*.tar.gz

# --- development --------------------------------------------------------------------------------------------------
.PHONY: dev lint lint-ruff lint-mypy lint-cpp lint-typos format
dev: $(STAMPS)/group-build $(STAMPS)/group-test
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$(BIN)/python -DPYBIGMODEL_CUDA=$(PYBIGMODEL_CUDA) >/dev/null
	cmake --build build/dev
	cmake --install build/dev --prefix . >/dev/null

build/tests-cpp/.built: CMakeLists.txt $(CPP_TESTS) $(STAMPS)/group-build
	cmake -S . -B build/tests-cpp -G Ninja -DPYBIGMODEL_TESTS_ONLY=ON -DPYBIGMODEL_SANITIZE=ON >/dev/null
	cmake --build build/tests-cpp
	touch $@

lint: lint-ruff lint-mypy lint-cpp lint-typos
lint-ruff: $(STAMPS)/group-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
lint-mypy: $(STAMPS)/group-lint
	$(BIN)/mypy
lint-cpp: $(STAMPS)/group-lint
	$(BIN)/clang-format --dry-run --Werror $(CPP_FORMATTED)
lint-typos: $(STAMPS)/group-lint
	$(BIN)/typos
format: $(STAMPS)/group-lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_FORMATTED)

# --- NVIDIA GPUs: beside the torch that PYTHON has, since a CUDA build of torch must match the driver ---------------
.PHONY: gpu
gpu:
	sh tools/preflight.sh --gpu '$(PYTHON)'
	cmake -S . -B build/gpu -DPython_EXECUTABLE="$$(command -v $(PYTHON))" -DPYBIGMODEL_CUDA=ON
	cmake --build build/gpu --parallel
	rm -rf build/gpu-package
	mkdir -p build/gpu-package
	cp -R pybigmodel build/gpu-package/
	cmake --install build/gpu --prefix build/gpu-package
	cd tests && PYTHONPATH="$(CURDIR)/build/gpu-package:$$PYTHONPATH" $(PYTHON) -m pytest ops/test_cuda.py $(ARGS)

.PHONY: clean distclean
clean:
	rm -rf build dist pybigmodel/*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -f $(STAMPS)/wheel $(STAMPS)/installed
distclean: clean
	rm -rf $(VENV)
