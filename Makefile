# `make demo` and `make test` need Python 3.11 and nothing else. Without a GPU add TORCH=cpu: it takes torch's CPU
# build, a tenth of the download.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= default
BIN := $(VENV)/bin
INDEX_cpu := --extra-index-url https://download.pytorch.org/whl/cpu

.PHONY: install check test soak parity e2e demo

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(INDEX_$(TORCH)) --editable '.[dev]' && touch $@

install: $(VENV)/.installed

check: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: install
	$(BIN)/pytest

soak: install
	$(BIN)/pytest -m soak

parity: install
	$(BIN)/pytest tests/parity

e2e: install
	$(BIN)/pytest tests/e2e tests/faults

demo: install
	$(BIN)/launch run quickstart
