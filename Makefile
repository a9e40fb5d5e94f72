# `make demo` and `make test` set up everything by themselves: a virtual environment in .venv. Without make:
# `python tools/make.py demo`. Only Python (3.10 or newer) has to be there. Another Python: make test PYTHON=python3.12
# Another build of torch: make demo TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

ifeq ($(OS),Windows_NT)
PYTHON ?= python
else
PYTHON ?= python3
endif

.PHONY: demo test test-all lint clean

demo test test-all lint clean:
	@$(PYTHON) tools/make.py $@
