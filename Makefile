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

.PHONY: demo examples notebooks notebooks-check pictures docs docs-serve test test-triton test-triton-hostile lint typecheck format bench bench-compare cuda-check gpu-check sanitize fuzz info parity clean

demo: $(VENV)/.demo
	$(BIN)/python examples/demo.py

# Tables to the terminal, plots to examples-output/; then what the examples claim, as tests.
examples: $(VENV)/.demo $(VENV)/.test
	set -e; for example in $(EXAMPLES); do echo "== $$example"; $(BIN)/python $$example; done
	$(BIN)/python -m pytest tests/test_examples.py $(PYTEST)

# Three examples as notebooks, made from the scripts; notebooks-check changes none.
notebooks: $(VENV)/.notebooks
	$(BIN)/python tools/notebooks.py write run

notebooks-check: $(VENV)/.notebooks
	$(BIN)/python tools/notebooks.py check run

# Strict, so not --quiet: that hides warnings from --strict as well, and a dead link would pass. The variable drops what
# mkdocs-material prints about its successor.
docs: export NO_MKDOCS_2_WARNING = 1
docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs
	$(BIN)/mkdocs serve

pictures: demo examples
	$(BIN)/python docs/draw_pictures.py

test: $(VENV)/.test
	$(BIN)/python -m pytest $(PYTEST)

# The Triton backend without a GPU: compiled for several, and run by Triton's interpreter.
test-triton: $(VENV)/.triton
	$(BIN)/python -m pytest tests/backends/test_triton_*.py tests/test_registry.py $(PYTEST)
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/backends/test_triton.py tests/test_edges.py -k triton $(PYTEST)

# Also the hostile suite in the interpreter: minutes.
test-triton-hostile: $(VENV)/.triton
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/test_edges.py tests/hostile \
		-k "triton or fuzz or rounding or extremes or prox_follows" $(PYTEST)

lint: $(VENV)/.lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(shell find csrc tests experiments -name '*.h' -o -name '*.cpp' -o -name '*.cu')

typecheck: $(VENV)/.lint
	$(BIN)/mypy

format: $(VENV)/.lint
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(shell find csrc tests experiments -name '*.h' -o -name '*.cpp' -o -name '*.cu')

# About five minutes, on a machine that does nothing else. BENCH=--quick takes one.
bench: $(VENV)/.bench
	$(BIN)/python benchmarks/cpu_step.py $(BENCH)

# The working tree beside another revision: make bench-compare BASE=main
BASE ?= HEAD
bench-compare: $(VENV)/.bench
	$(BIN)/python tools/bench_compare.py $(BASE) $(PYTEST)

# Needs nvcc and no GPU: registers, shared memory and spills of every CUDA kernel.
cuda-check: $(VENV)/.test
	$(BIN)/python -m pytest -s tests/backends/test_cuda_kernels.py

# On a machine with a GPU, with the Python and torch that are there: builds in place, tests, measures.
gpu-check:
	$(PYTHON) setup.py -q build_ext --inplace
	$(PYTHON) -m fusedreg info
	$(PYTHON) -m pytest -q -m gpu $(PYTEST)
	$(PYTHON) benchmarks/gpu_step.py

# The extension with AddressSanitizer and UndefinedBehaviorSanitizer, and the suites that reach the farthest into it.
sanitize: $(VENV)/.test
	BIN=$(BIN) FUSEDREG_NO_CUDA=1 tools/sanitize $(PYTEST)

# New examples in every run, FUZZ_EXAMPLES of each property.
fuzz: $(VENV)/.test
	FUZZ_EXAMPLES=$${FUZZ_EXAMPLES:-5000} $(BIN)/python -m pytest tests/hostile/test_fuzz.py $(PYTEST)

info parity: $(VENV)/.built
	$(BIN)/python -m fusedreg $@

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV) || { echo "make: no virtual environment; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	$(PIP) --upgrade pip "setuptools>=64" wheel ninja
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

$(VENV)/.notebooks: $(VENV)/.demo requirements/notebooks.txt
	$(PIP) -r requirements/notebooks.txt
	touch $@

$(VENV)/.docs: $(VENV)/.built requirements/docs.txt
	$(PIP) -r requirements/docs.txt
	touch $@

$(VENV)/.triton: $(VENV)/.test requirements/triton.txt
	$(PIP) -r requirements/triton.txt
	touch $@

$(VENV)/.bench: $(VENV)/.built requirements/bench.txt
	$(PIP) -r requirements/bench.txt
	touch $@

$(VENV)/.lint: $(VENV)/.built requirements/lint.txt
	$(PIP) -r requirements/lint.txt
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fusedreg/*.so fusedreg/_built_with.py demo-output examples-output bench-output site
