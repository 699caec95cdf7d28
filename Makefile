# Every target sets up what it needs, once, in .venv. Variables:
#   PYTHON  the interpreter to make the virtual environment with     make test PYTHON=python3.12
#   TORCH   what pip installs as torch: a version, a wheel, a folder  make test TORCH=torch==2.12.0
#   PYTEST  more arguments for pytest                                 make test PYTEST="-k parity -x"
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
EXAMPLES := $(sort $(filter-out examples/_% examples/demo%, $(wildcard examples/*.py)))
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CPP := $(shell find csrc tests experiments -name '*.h' -o -name '*.cpp' -o -name '*.cu')

.PHONY: help check test test-triton test-cuda test-frameworks sanitize fuzz wheel test-wheel lint format typecheck demo examples notebooks docs experiments bench bench-compare gpu-check clean
.NOTPARALLEL: # they install into one environment

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

check: NOTEBOOKS = check
check: test test-triton test-cuda test-frameworks sanitize lint typecheck demo examples notebooks docs ## what a change must pass
	$(BIN)/python -m fusedreg info

# Two tests at a time, of different files, which share fixtures.
AT_A_TIME := -n 2 --dist loadfile --no-loadscope-reorder
WITH_A_TARGET_OF_THEIR_OWN := tests/test_examples.py tests/backends/test_triton_*.py tests/backends/test_cuda_kernels.py tests/backends/test_cuda_threads.py tests/frameworks
test: $(VENV)/.test ## the tests that have no target of their own; PYTEST="-k parity -x" are arguments for pytest
	$(BIN)/python -m pytest $(AT_A_TIME) $(addprefix --ignore=,$(wildcard $(WITH_A_TARGET_OF_THEIR_OWN))) $(PYTEST)

TRITON_HOSTILE := tests/test_edges.py tests/hostile -k "triton or fuzz or rounding or extremes or prox_follows"
test-triton: $(VENV)/.triton ## the Triton backend without a GPU, compiled and interpreted; HOSTILE=1: hostile input too
	$(BIN)/python -m pytest $(AT_A_TIME) tests/backends/test_triton_*.py tests/test_registry.py $(PYTEST)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest $(AT_A_TIME) tests/backends/test_triton.py tests/backends/test_without_gpu.py tests/test_edges.py tests/test_constraints.py tests/truth/test_unit_penalties.py tests/distributed -k "triton or several-meshes" $(PYTEST)
	$(if $(HOSTILE),TRITON_INTERPRET=1 $(BIN)/python -m pytest $(TRITON_HOSTILE) $(PYTEST))

test-cuda: $(VENV)/.test ## the CUDA kernels without a GPU: on threads, sought for races; where nvcc is, compiled and read
	$(BIN)/python -m pytest tests/backends/test_cuda_threads.py tests/backends/test_cuda_kernels.py $(PYTEST)

FRAMEWORKS := $(VENV)/frameworks
FRAMEWORKS_PAGE := "tests/test_docs.py::test_snippets_run[docs/frameworks.md]"
test-frameworks: $(VENV)/.built $(VENV)/.frameworks ## in the frameworks where people train, in an environment of their own
	$(FRAMEWORKS)/bin/python -m pytest tests/frameworks $(FRAMEWORKS_PAGE) $(PYTEST)

# The suites that reach the farthest into the extension.
sanitize: $(VENV)/.test ## the extension under AddressSanitizer and UndefinedBehaviorSanitizer
	BIN=$(BIN) FUSEDREG_NO_CUDA=1 tools/sanitize $(PYTEST)

fuzz: $(VENV)/.test ## hostile input, new in every run: FUZZ_EXAMPLES=5000 of each property
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-5000} $(BIN)/python -m pytest tests/hostile/test_fuzz.py tests/sparsity/test_compact_fuzz.py $(PYTEST)

# torch is there wherever the wheel is. auditwheel grants the lowest tag that what the compiler has linked allows.
wheel: $(VENV)/.wheel ## one wheel for CPUs, in dist/: Python 3.10 and later, torch 2.10 and later, no compiler needed
	rm -rf dist/fusedreg-*.whl dist/unrepaired
	FUSEDREG_STABLE=1 $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir dist/unrepaired .
	PATH="$(abspath $(BIN)):$$PATH" $(BIN)/auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist dist/unrepaired/*.whl
	rm -r dist/unrepaired

WHEEL_IN ?= $(PYTHON)=2.10.0 $(PYTHON)=2.12.0 $(PYTHON)=2.13.0 $(PYTHON)=newest
test-wheel: wheel ## the wheel in fresh environments, gigabytes each; WHEEL_IN="python3.10=2.10.0 python3.13=newest" names others
	$(BIN)/python tools/wheel_check.py dist/fusedreg-*.whl $(WHEEL_IN)

lint: $(VENV)/.lint ## ruff and clang-format, which change nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/.lint ## the same, and they change what they find
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

typecheck: $(VENV)/.lint ## mypy on fusedreg/
	$(BIN)/mypy

demo: $(VENV)/.demo ## trains on real data: tables, and plots in demo-output/
	$(BIN)/python examples/demo.py

examples: $(VENV)/.demo $(VENV)/.test ## runs the examples, plots in examples-output/, and tests what they claim
	set -e; for example in $(EXAMPLES); do echo "== $$example"; $(BIN)/python $$example; done
	$(BIN)/python -m pytest tests/test_examples.py $(PYTEST)

NOTEBOOKS ?= write
notebooks: $(VENV)/.notebooks ## makes the notebooks from their scripts and runs them; NOTEBOOKS=check writes none
	$(BIN)/python tools/notebooks.py $(NOTEBOOKS) run

# Strict, so not --quiet: that hides warnings from --strict as well, and a dead link would pass. The variable drops what
# mkdocs-material prints about its successor.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs ## the documentation, in site/; a dead link fails
	$(BIN)/mkdocs build --strict

experiments: $(VENV)/.experiments ## zeros and accuracy beside other ways to prune, an hour; runs what experiments/sparsity/ has no results of
	$(BIN)/python -m experiments.sparsity run
	$(BIN)/python -m experiments.sparsity run --sanity
	$(BIN)/python -m experiments.sparsity strengths
	$(BIN)/python -m experiments.sparsity survivors
	$(BIN)/python -m experiments.sparsity tables
	$(BIN)/python -m experiments.sparsity plot

bench: $(VENV)/.bench ## times a CPU step, five minutes on a machine that does nothing else; BENCH=--quick takes one
	$(BIN)/python benchmarks/cpu_step.py $(BENCH)

BASE ?= HEAD
bench-compare: $(VENV)/.bench ## times the working tree beside another revision, BASE=main
	$(BIN)/python tools/bench_compare.py $(BASE) $(PYTEST)

# With the Python and torch that are there, not in .venv. In parts of at most 8 minutes each; see tools/gpu_check.py.
gpu-check: ## on a machine with a GPU: builds in place, tests, measures, and goes on where it was; PARTS="build time"
	$(PYTHON) tools/gpu_check.py $(PARTS)

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV) || { echo "make: no virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PIP) --upgrade pip "setuptools>=77" wheel ninja
	$(PIP) "$(TORCH)"
	touch $@

# Built in place; rebuilt when a source changes.
$(VENV)/.built: $(VENV)/.torch $(SOURCES)
	$(PIP) --no-build-isolation --editable .
	touch $@

$(VENV)/.demo: $(VENV)/.built requirements/demo.txt
	$(PIP) -r requirements/demo.txt
	touch $@

$(VENV)/.test: $(VENV)/.built requirements/test.txt
	$(PIP) -r requirements/test.txt
	touch $@

$(VENV)/.wheel: $(VENV)/.torch requirements/wheel.txt
	$(PIP) -r requirements/wheel.txt
	touch $@

$(VENV)/.notebooks: $(VENV)/.demo requirements/notebooks.txt
	$(PIP) -r requirements/notebooks.txt
	touch $@

$(VENV)/.docs: $(VENV)/.built requirements/docs.txt
	$(PIP) -r requirements/docs.txt
	touch $@

$(VENV)/.triton: $(VENV)/.test requirements/triton.txt
	$(PIP) -r requirements/triton.txt
	touch $@

# Of its own: what they need is much, and must not decide what the others get. The extension is the one in the folder.
$(VENV)/.frameworks: requirements/frameworks.txt | $(VENV)/.torch
	$(PYTHON) -m venv $(FRAMEWORKS)
	$(FRAMEWORKS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --no-compile -r $<
	touch $@

$(VENV)/.experiments: $(VENV)/.built requirements/experiments.txt
	$(PIP) -r requirements/experiments.txt
	touch $@

$(VENV)/.bench: $(VENV)/.built requirements/bench.txt
	$(PIP) -r requirements/bench.txt
	touch $@

$(VENV)/.lint: $(VENV)/.built requirements/lint.txt
	$(PIP) -r requirements/lint.txt
	touch $@

clean: ## removes .venv and everything built
	rm -rf $(VENV) build dist *.egg-info fusedreg/*.so fusedreg/_built_with.py demo-output examples-output bench-output site
