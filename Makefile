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

GPU_PYTEST = TRITON_INTERPRET=0 $(PYTHON) -m pytest -q -p no:benchmark
GPU_RESULTS ?= benchmarks/results
# As many test processes as asked for, where pytest-xdist is there.
spread = $(shell $(PYTHON) -c 'import xdist' 2>/dev/null && echo "-n $(1)")
# Every tensor an allocation of its own: what lies beyond one is no other's.
sanitize = TRITON_INTERPRET=0 PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $(1) --error-exitcode 1 \
  $(PYTHON) -m pytest -q -p no:benchmark -p no:xdist

.PHONY: demo test test-full bench lint clean
.PHONY: gpu gpu-build gpu-check gpu-pairwise gpu-sanitize gpu-tune gpu-bench gpu-bench-graph gpu-test gpu-machine
.DELETE_ON_ERROR:
.NOTPARALLEL:

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

# Into the Python that runs: on a machine with a GPU its torch is there already, with its own CUDA. A stage can
# be run by itself and is meant to end within ten minutes; pip fetches nothing that is there already.
gpu: gpu-build gpu-check gpu-pairwise gpu-sanitize gpu-tune gpu-bench gpu-bench-graph gpu-test

# What the doctor finds stops no stage: the checks come after it.
gpu-build: gpu-machine
	@missing=; for need in $(BUILD_TOOLS) pytest; do name=$${need%%[>=]*}; \
	  $(PYTHON) -c "import $$name" 2>/dev/null || missing="$$missing $$need"; done; \
	if [ -n "$$missing" ]; then echo "fetching:$$missing"; $(PYTHON) $(INSTALL) $$missing; fi
	SACCADE_CUDA=1 SACCADE_REQUIRE_EXT=1 $(PYTHON) $(INSTALL) --no-build-isolation --no-deps -e .
	-$(PYTHON) -m saccade doctor

# First every wrapper of the device layer, then what stands on it. Nearly every case compiles Triton kernels of
# its own: processes share the GPU, but for those that fill its memory.
gpu-check: gpu-build
	@status=0; $(GPU_PYTEST) tests/test_gpu_wrappers.py || status=1; \
	$(GPU_PYTEST) $(call spread,8) -k 'not pairwise and not far' tests/test_gpu.py tests/test_gpu_runtime.py || status=1; \
	$(GPU_PYTEST) -k far tests/test_gpu.py || status=1; exit $$status

gpu-pairwise: gpu-build
	$(GPU_PYTEST) $(call spread,8) -k pairwise tests/test_gpu.py

# racecheck knows neither the copy engine's barriers nor wgmma: only kernels without them are shown to it, those
# of the tests that are called general.
gpu-sanitize: gpu-build
	@command -v compute-sanitizer >/dev/null || { echo "gpu-sanitize: no compute-sanitizer"; exit 1; }
	@status=0; $(call sanitize,memcheck) -k 'not pairwise and not far' tests/test_gpu.py || status=1; \
	$(call sanitize,racecheck) -k 'cuda and general' tests/test_gpu.py || status=1; exit $$status

gpu-tune: gpu-build
	$(PYTHON) -m saccade.kernels.tune --dims 128 64 256 --seconds 480

gpu-bench: gpu-build
	$(PYTHON) -m saccade bench --device cuda --suite gpu --seconds 500 --out $(GPU_RESULTS)

gpu-bench-graph: gpu-build
	$(PYTHON) -m saccade bench --device cuda --suite gpu-graph --seconds 500 --out $(GPU_RESULTS)

# Everything else, as on a machine without a GPU.
gpu-test: gpu-build
	CUDA_VISIBLE_DEVICES= OMP_NUM_THREADS=1 $(PYTHON) -m pytest -q -p no:benchmark $(call spread,auto) tests

gpu-machine:
	@$(PYTHON) -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null || { \
	  echo "make gpu: '$(PYTHON)' has no torch that sees a CUDA device"; exit 1; }

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
