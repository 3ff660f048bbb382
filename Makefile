# Two commands: `make demo` and `make test`. Each sets up .venv from requirements.lock first, and is quick once that is done.
SHELL := /bin/bash
.DEFAULT_GOAL := help
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# Any Python 3.11 or 3.12; override with `make PYTHON=/path/to/python3.12 demo`.
PYTHON ?= $(shell for p in python3.12 python3.11 python3; do "$$p" -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && command -v "$$p" && break; done)
# One more than the cores of a small machine: many tests wait for processes.
WORKERS ?= 3
# A worker keeps a file, whose tests share fixtures; the order of files is that of tests/conftest.py.
PARALLEL = -n $(WORKERS) --dist loadfile --no-loadscope-reorder

.PHONY: help setup demo evidence test lint test-fast bench-guard lock clean

help:
	@echo "make demo    set up, pre-train a small LUT on handwritten digits, report to runs/demo/report.html (minutes)"
	@echo "make test    set up, lint, type check, all tests"
	@echo "make bench-guard  whether a training step costs more CPU time than when benchmarks/step_guard.json was committed"
	@echo "make evidence  set up, train and compare what benchmarks/evidence compares (under an hour)"
	@echo "make lock    re-resolve requirements.lock (needs uv)"

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@test -n "$(PYTHON)" || { echo "make: no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@echo "set-up: creating $(VENV) with $(PYTHON) and installing requirements.lock (about 3 GB the first time)"
	@test -x $(BIN)/python || "$(PYTHON)" -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@
	@echo "set-up: done"

demo: setup
	@echo "demo: pre-training a small LUT on handwritten digits; interrupt and run again as you like"
	@$(BIN)/lut-ds demo

evidence: setup
	@echo "evidence: benchmarks/evidence on this machine; interrupt and run again as you like"
	@$(BIN)/lut-ds data shapes runs/evidence/data --train 2560 --val 1500 --size 24
	@$(BIN)/lut-ds sweep benchmarks/evidence/evidence.yaml --out runs/evidence --jobs 2 data.path=runs/evidence/data

test: setup lint
	@echo "tests: all of them, fast and slow, on $(WORKERS) workers"
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL)

test-fast: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q $(PARALLEL) -m "not slow"

lint: setup
	@echo "lint: ruff and mypy"
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy

bench-guard: setup
	@$(BIN)/python benchmarks/step_guard.py

lock:
	uv pip compile pyproject.toml --extra cuda13 --extra dev --universal --python-version 3.11 --generate-hashes \
	  --no-emit-index-url --no-header --quiet -o requirements.lock

clean:
	rm -rf $(VENV) runs
