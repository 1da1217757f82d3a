# The everyday commands; `make help` lists them. CMake and pyproject.toml do the work.
SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

PYTHON ?= python3
export PYTHON
# One name for the compiler in every build, the wheel's too: ccache tells g++ from c++.
ifeq ($(origin CXX),default)
CXX := g++
endif
export CXX
JOBS ?= $(shell nproc)
# More options for CMake, such as CMAKE_ARGS="-DQUANTLOOM_CUDA=OFF"; scikit-build-core reads them too.
CMAKE_ARGS ?=
export CMAKE_ARGS
# Waiting threads sleep: on a busy machine, spinning ones take the processor from those that work.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

VENV := .venv
VENV_PYTHON := $(VENV)/bin/python
CONFIGURE = cmake -S . -G Ninja $(CMAKE_ARGS)
RELEASE := build/release
INSTALLED := $(CURDIR)/$(RELEASE)/prefix

extension_sources := $(shell find CMakeLists.txt cmake cuda include src python -type f \
  -not -name '*.so' -not -name '*.pyc' 2>/dev/null)
cpp_files = $(shell git ls-files '*.hpp' '*.cpp' '*.cuh' '*.cu')

.PHONY: help
help: ## list these commands
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

.PHONY: packages
packages:
	@scripts/setup packages build

$(VENV)/.dependencies: pyproject.toml scripts/setup | packages
	@scripts/setup venv
	@touch $@

# The extension is built with the packages of .venv, so that nothing is downloaded twice.
$(VENV)/.package: $(VENV)/.dependencies $(extension_sources)
	@echo "building and installing the quantloom package into $(VENV)"
	@CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(VENV_PYTHON) -m pip --disable-pip-version-check install --quiet \
	  --no-build-isolation --no-deps --force-reinstall .
	@$(VENV_PYTHON) -c 'import quantloom as ql; i = ql.build_info(); \
	  print("quantloom", i["version"], "with CUDA " + i["cuda_toolkit"] if i["cuda"] else "CPU only")'
	@touch $@

.PHONY: demo
demo: $(VENV)/.package ## quantize the embedded model at many settings; results in demo-out/
	@$(VENV)/bin/quantloom demo

.PHONY: test
test: $(VENV)/.package ## all tests that need no GPU: C++, installed package, Python
	@$(CONFIGURE) -B $(RELEASE) -DQUANTLOOM_BUILD_TESTS=ON -DCMAKE_INSTALL_PREFIX=$(INSTALLED)
	@cmake --build $(RELEASE) -j $(JOBS)
	@ctest --test-dir $(RELEASE) --output-on-failure --label-exclude gpu -j $(JOBS)
	@rm -rf $(INSTALLED) $(RELEASE)/consumer
	@cmake --install $(RELEASE) > $(RELEASE)/install.log
	@cmake -S examples/cmake_consumer -B $(RELEASE)/consumer -G Ninja -DCMAKE_PREFIX_PATH=$(INSTALLED) \
	  > $(RELEASE)/consumer.log
	@cmake --build $(RELEASE)/consumer
	@$(RELEASE)/consumer/consumer
	@$(VENV_PYTHON) -m pytest tests/python

.PHONY: bench
bench: packages ## build the CPU benchmarks and run them
	@$(CONFIGURE) -B $(RELEASE) -DQUANTLOOM_BUILD_BENCHMARKS=ON
	@cmake --build $(RELEASE) -j $(JOBS)
	@for program in $(RELEASE)/bench/cpu/bench_*; do \
	  if [[ -f $$program && -x $$program ]]; then echo "== $${program##*/}"; $$program; fi; done

# With PREFIX, a folder that scripts/vendor-deps filled, the GPU targets need no network and install nothing:
# they take libraries from there and PYTHON as it is. Without it they use Debian's packages and .venv.
PREFIX :=
GPU := build/gpu
test-gpu bench-gpu: export CUDACXX ?= $(firstword $(shell command -v nvcc) $(wildcard /usr/local/cuda/bin/nvcc))
GPU_CONFIGURE = cmake -S . -B $(GPU) -G Ninja -DQUANTLOOM_CUDA=ON
ifeq ($(PREFIX),)
test_gpu_needs := $(VENV)/.dependencies
bench_gpu_needs := packages
GPU_PYTHON := $(CURDIR)/$(VENV_PYTHON)
GPU_PYTHONPATH := $(CURDIR)/python
else
test_gpu_needs :=
bench_gpu_needs :=
GPU_PYTHON := $(shell $(PYTHON) -c 'import sys; print(sys.executable)')
GPU_PYTHONPATH := $(CURDIR)/python:$(abspath $(PREFIX))/python
GPU_CONFIGURE += -DCMAKE_PREFIX_PATH=$(abspath $(PREFIX)) -DFETCHCONTENT_FULLY_DISCONNECTED=ON
endif
GPU_CONFIGURE += $(CMAKE_ARGS)
# The C++ programs open cuBLAS and cuSOLVER by name; pip packages keep them in folders of their own.
GPU_RUN = LD_LIBRARY_PATH="$${LD_LIBRARY_PATH:+$$LD_LIBRARY_PATH:}$$($(GPU_PYTHON) scripts/cuda-library-folders 2>/dev/null || true)"

.PHONY: gpu
gpu:
	@test -z '$(PREFIX)' || test -d '$(PREFIX)/include' || \
	  { echo 'make: PREFIX=$(PREFIX) holds no headers; scripts/vendor-deps fills such a folder' >&2; exit 2; }
	@nvidia-smi -L 2>/dev/null | grep -q '^GPU' || \
	  { echo 'make: this target needs an NVIDIA GPU, but nvidia-smi lists none' >&2; exit 3; }

.PHONY: test-gpu
test-gpu: gpu | $(test_gpu_needs) ## all tests that need a GPU: C++, compute-sanitizer, Python; PREFIX=DIR: offline
	@$(GPU_CONFIGURE) -DQUANTLOOM_BUILD_TESTS=ON -DQUANTLOOM_BUILD_PYTHON=ON \
	  -DPython_EXECUTABLE=$(GPU_PYTHON)
	@cmake --build $(GPU) -j $(JOBS) --target quantloom_gpu_tests _core
	@$(GPU_RUN) $(GPU)/tests/gpu/quantloom_gpu_tests
	@PYTHONPATH=$(GPU_PYTHONPATH) $(GPU_PYTHON) -c 'import torch, quantloom; \
	  torch.cuda.is_available() or exit("make: this PyTorch sees no GPU"); print("PyTorch", torch.__version__)'
	@PYTHONPATH=$(GPU_PYTHONPATH) $(GPU_PYTHON) -m pytest $(wildcard tests/python/test_*cuda*.py)
	@PYTHONPATH=$(GPU_PYTHONPATH) $(GPU_PYTHON) -m quantloom doctor
	@$(GPU_RUN) scripts/sanitize-gpu $(GPU)/tests/gpu/quantloom_gpu_tests

.PHONY: bench-gpu
bench-gpu: gpu | $(bench_gpu_needs) ## the GPU benchmarks, with JSON to build/bench-gpu/; PREFIX=DIR: offline
	@$(GPU_CONFIGURE) -DQUANTLOOM_BUILD_BENCHMARKS=GPU -DQUANTLOOM_BUILD_TESTS=OFF \
	  -DQUANTLOOM_BUILD_PYTHON=OFF
	@cmake --build $(GPU) -j $(JOBS) --target gpu_benchmarks
	@mkdir -p build/bench-gpu
	@for program in $(GPU)/bench/gpu/bench_*; do name=$${program##*/}; echo "== $$name"; \
	  $(GPU_RUN) $$program --json build/bench-gpu/$$name.json; done

.PHONY: sanitize
sanitize: packages ## the C++ tests under AddressSanitizer and UndefinedBehaviorSanitizer
	@$(CONFIGURE) -B build/sanitize -DQUANTLOOM_SANITIZE=ON -DQUANTLOOM_CUDA=OFF -DQUANTLOOM_BUILD_TESTS=ON \
	  -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS_DEBUG="-O1 -g1"
	@cmake --build build/sanitize -j $(JOBS)
	@UBSAN_OPTIONS=print_stacktrace=1 ctest --test-dir build/sanitize --output-on-failure -j $(JOBS)

.PHONY: fuzz
FUZZ_SECONDS ?= 60
fuzz: packages ## each libFuzzer target for FUZZ_SECONDS (60)
	@scripts/setup packages fuzz
	@$(CONFIGURE) -B build/fuzz -DQUANTLOOM_BUILD_FUZZERS=ON -DQUANTLOOM_CUDA=OFF -DQUANTLOOM_BUILD_TESTS=OFF \
	  -DQUANTLOOM_FUZZ_SECONDS=$(FUZZ_SECONDS)
	@cmake --build build/fuzz -j $(JOBS) --target fuzz

.PHONY: format
format: $(VENV)/.dependencies ## rewrite the sources in the project's style
	@scripts/setup packages lint
	@clang-format -i $(cpp_files)
	@$(VENV)/bin/ruff check --quiet --fix . || true
	@$(VENV)/bin/ruff format .

.PHONY: lint
lint: $(VENV)/.dependencies ## style, static analysis, rules of the layout
	@scripts/setup packages lint
	@clang-format --dry-run -Werror $(cpp_files)
	@$(VENV)/bin/ruff format --check .
	@$(VENV)/bin/ruff check .
	@$(VENV_PYTHON) scripts/check_layout
	@mkdir -p build
	@$(CONFIGURE) -B build/lint -DQUANTLOOM_CUDA=OFF -DQUANTLOOM_BUILD_TESTS=OFF > build/lint.log
	@git ls-files 'src/*.cpp' | grep -v cuda_unavailable | \
	  xargs -P $(JOBS) -n 1 clang-tidy --quiet -p build/lint

.PHONY: clean
clean: ## remove what the other commands made, .venv included
	@rm -rf build $(VENV) demo-out python/quantloom/_core*.so .pytest_cache .hypothesis .ruff_cache
