# `make demo` and `make test` need Python 3.11 and nothing else. Without a GPU add TORCH=cpu: it takes torch's CPU
# build, a tenth of the download.
PYTHON ?= python3
VENV ?= .venv
TORCH ?= default
BIN := $(VENV)/bin
INDEX_cpu := --extra-index-url https://download.pytorch.org/whl/cpu

# The last TRL with a PPO trainer, beside the installed one: tests/parity and benchmarks/ppo.py compare with it.
PEERS := .peers/trl-1.12

# Rollouts by vLLM, in an environment of its own: the GPU build where there is a GPU, else the CPU build.
VLLM_VENV ?= .venv-vllm

.PHONY: install check test soak parity e2e mutants demo peers vllm

$(VENV)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(INDEX_$(TORCH)) --editable '.[dev]' && touch $@

$(PEERS)/.installed: | $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(PEERS) trl==1.12.0 && touch $@

$(VLLM_VENV)/.installed: launch/install_vllm.py | $(VENV)/.installed
	$(BIN)/python -m launch.install_vllm $(VLLM_VENV) && touch $@

install: $(VENV)/.installed

peers: $(PEERS)/.installed

vllm: $(VLLM_VENV)/.installed

check: install
	$(BIN)/ruff check . && $(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

test: install peers
	$(BIN)/pytest

soak: install
	$(BIN)/pytest -m soak

parity: install peers
	$(BIN)/pytest tests/parity

e2e: install
	$(BIN)/pytest tests/e2e tests/faults

mutants: install
	$(BIN)/python -m tests.mutations.run

demo: install
	$(BIN)/launch run quickstart
