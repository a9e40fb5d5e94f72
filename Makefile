# `make demo` and `make test` set up everything by themselves: a virtual environment in .venv.
# Only Python (3.10 or newer) and make have to be there. Another Python: make test PYTHON=python3.12

VENV := .venv
ifeq ($(OS),Windows_NT)
PYTHON ?= python
BIN := $(VENV)/Scripts
# without it, what a program writes into a pipe is not UTF-8 there
export PYTHONUTF8 := 1
else
PYTHON ?= python3
BIN := $(VENV)/bin
endif
# installed before everything else, so that nothing else chooses another build; options for pip may stand here too
TORCH ?= torch==2.13.0

.PHONY: demo test test-all lint clean

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -e '.[plot]'
	touch $@

$(VENV)/.tools: $(VENV)/.installed  # what the tests compare with takes longer to install than all the rest
	$(BIN)/python -m pip install -q -e '.[test,plot]'
	touch $@

demo: $(VENV)/.installed  ## teach the built-in model to add, in under two minutes
	$(BIN)/litgpt finetune lora --config pico/lora --out_dir out/demo --overwrite
	@echo "  litgpt finetune lora checkpoints/ORG/MODEL my.json   # the same on a real model"

lint: $(VENV)/.tools
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/codespell

test: lint  ## everything that has to hold before a commit, in minutes
	$(BIN)/python -m pytest -n auto -m "not long"

test-all: lint  ## the long matrices too
	$(BIN)/python -m pytest -n auto

clean:  ## finished runs in out/ stay, the demo's excepted
	rm -rf $(VENV) out/demo
