# make demo, make test: a virtual environment in .venv is made, filled and kept up to date first.
# PYTHON=python3.12 make test    chooses the Python; WORKERS=1 the number of test processes.

PYTHON ?= python3
WORKERS ?= 2
VENV := .venv
RUN := $(VENV)/bin/python
TORCH := $(shell grep -o 'torch==[0-9.]*' pyproject.toml)
BUILD_TOOLS := 'setuptools>=77' wheel ninja pybind11

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh')
INSTALL := -m pip install --quiet --disable-pip-version-check

# One thread per worker: the workers are the parallelism, and the tests that need threads ask for them.
PYTEST := OMP_NUM_THREADS=1 $(RUN) -m pytest -q -p no:benchmark -n $(WORKERS)

.PHONY: demo test test-full bench lint gpu clean
.DELETE_ON_ERROR:

demo: $(VENV)/built
	$(RUN) examples/language_model/run.py

test: $(VENV)/built
	$(PYTEST) tests

test-full: $(VENV)/built
	$(PYTEST) -m "full or not full" tests

bench: $(VENV)/built
	$(RUN) -m saccade bench

lint: $(VENV)/built
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(SOURCES)

# Into the Python that runs: on a machine with a GPU its torch is there already, with its own CUDA.
gpu:
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { \
	  echo "make gpu: '$(PYTHON)' has no torch that sees a CUDA device"; exit 1; }
	$(PYTHON) $(INSTALL) $(BUILD_TOOLS)
	SACCADE_CUDA=1 SACCADE_REQUIRE_EXT=1 $(PYTHON) $(INSTALL) --no-build-isolation -e '.[bench,test]'
	$(PYTHON) -m pytest -q -n auto -p no:benchmark tests
	TRITON_INTERPRET=0 $(PYTHON) -m pytest -q tests/test_gpu.py
	@if command -v compute-sanitizer >/dev/null; then for tool in memcheck racecheck; do \
	  TRITON_INTERPRET=0 compute-sanitizer --tool $$tool --error-exitcode 1 \
	    $(PYTHON) -m pytest -q -k 'not pairwise' tests/test_gpu.py || exit 1; done; fi
	$(PYTHON) -m saccade.kernels.tune
	$(PYTHON) -m saccade bench --device cuda
	$(PYTHON) -m saccade bench --device cuda --suite graph

clean:
	rm -rf $(VENV) build dist python/saccade.egg-info
	find python -name '*.so' -delete

# Two stamps: the tools change with pyproject.toml, the build with the sources.
$(VENV)/tools: pyproject.toml
	@$(MAKE) --no-print-directory check-machine
	$(PYTHON) -m venv $(VENV)
	$(RUN) $(INSTALL) $(BUILD_TOOLS) $(TORCH)
	@touch $@

$(VENV)/built: $(VENV)/tools setup.py $(SOURCES)
	SACCADE_REQUIRE_EXT=1 $(RUN) $(INSTALL) --no-build-isolation -e '.[dev]'
	@touch $@

# What pip would find missing only after minutes of downloads.
.PHONY: check-machine
check-machine:
	@missing=; \
	has() { $(PYTHON) -c "$$1" 2>/dev/null; }; \
	has 'import sys; assert sys.version_info >= (3, 10)' || missing="$$missing python3"; \
	has 'import venv, ensurepip' || missing="$$missing python3-venv"; \
	has 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' || missing="$$missing python3-dev"; \
	command -v $(firstword $(CXX)) >/dev/null || missing="$$missing g++"; \
	if [ -n "$$missing" ]; then \
	  echo "saccade needs Python 3.10 or later with venv and headers, and a C++ compiler."; \
	  echo "Missing for PYTHON=$(PYTHON), CXX=$(CXX):$$missing"; \
	  echo "Debian, Ubuntu: apt-get install$$missing"; \
	  exit 1; \
	fi
