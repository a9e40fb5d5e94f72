# `make demo` and `make test` set up everything by themselves: a virtual environment in .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TORCH ?= torch==2.13.0  # said first, so that nothing else chooses another build

.PHONY: demo test test-all lint clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[test,plot]'
	touch $@

demo: $(VENV)/.installed  ## finetune a small model, on rows that the project generates
	$(BIN)/python demo.py

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

test: lint  ## everything that has to hold before a commit, in minutes
	$(BIN)/python -m pytest -n auto -m "not long"

test-all: lint  ## the long matrices too
	$(BIN)/python -m pytest -n auto

clean:
	rm -rf $(VENV) out
