# One command per task; each sets up what it needs (tools/setup.py) and is quick the second time.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?=
JOBS ?= $(shell nproc 2>/dev/null || echo 2)
export PYTHON

# Any Python 3 can run the setup script, which then looks for one that fits the package.
SETUP := $(or $(PYTHON),python3) tools/setup.py
PY := .venv/bin/python
BUILD := build/make
CPP_SOURCES = $(shell git ls-files --cached --others --exclude-standard '*.h' '*.cpp' '*.cu' '*.cuh' 2>/dev/null)

.PHONY: help setup build demo test bench tables plots gpu sanitize lint format wheel clean

help: ## show this list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## (.*)/  make \1\t\2/' | expand -t 18

setup: ## the virtual environment with everything that the other commands use
	@$(SETUP) test demo plot

build: ## the library, the tools and the Python package, into .venv
	@$(SETUP) build

demo: ## the four seeds and a trained network, verified and timed beside PyTorch
	@$(SETUP) demo
	@$(PY) examples/demo.py $(ARGS)

test: ## style, C++ tests, Python tests, the repository's own rules
	@$(SETUP) test
	@failed=""; \
	$(MAKE) --no-print-directory lint || failed="$$failed style"; \
	ctest --test-dir $(BUILD) --output-on-failure --no-tests=error -j $(JOBS) --timeout 600 || failed="$$failed C++"; \
	$(PY) -m pytest tests -n $(JOBS) -rs -q $(ARGS) || failed="$$failed Python"; \
	if [[ -n $$failed ]]; then echo "make test: failed:$$failed"; exit 1; fi

bench: ## every problem beside PyTorch on this machine's CPU; ARGS="--filter seed" and the like
	@$(SETUP) build
	@mkdir -p bench/results/local
	@$(PY) -m tconv bench --json bench/results/local/cpu.json $(ARGS)

tables: ## write the tables in README and docs from bench/results
	@$(SETUP) base
	@$(PY) bench/tables.py --write

plots: ## draw docs/images from bench/results
	@$(SETUP) plot
	@$(PY) bench/plot.py

gpu: ## on a machine with a GPU and PyTorch, without network: install dist/*.whl, test, measure; STAGES, FILTER, OUT
	@bash tools/gpu.sh

sanitize: ## the C++ tests (not the compile checks of device code) under the address and undefined-behaviour sanitizers
	@$(SETUP) sanitize
	@PATH="$(CURDIR)/.venv/bin:$$PATH" cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	  -DTCONV_TESTS=ON -DTCONV_TOOLS=ON -DTCONV_PYTHON=OFF -DTCONV_SANITIZE=address,undefined >/dev/null
	@PATH="$(CURDIR)/.venv/bin:$$PATH" cmake --build build/sanitize -j $(JOBS)
	@UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 ASAN_OPTIONS=detect_leaks=1 \
	  ctest --test-dir build/sanitize -E Targets/Compile --output-on-failure --no-tests=error -j $(JOBS) --timeout 1200

lint: ## formats and types
	@$(SETUP) lint
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@.venv/bin/clang-format --dry-run --Werror $(CPP_SOURCES)
	@$(PY) -m mypy

format: ## rewrite the sources in the project's format
	@$(SETUP) lint
	@$(PY) -m ruff check --fix .
	@$(PY) -m ruff format .
	@.venv/bin/clang-format -i $(CPP_SOURCES)

wheel: ## dist/*.whl, one file for every PyTorch and Python; GPU_PYTHON=3.12 adds the tests' packages in dist/deps
	@$(SETUP) wheel

clean: ## remove what was built; the virtual environment stays
	@rm -rf build dist out
