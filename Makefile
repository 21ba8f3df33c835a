# `make demo` and `make test` need only python3.11+, pip and make: the first call installs into .venv.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed

.PHONY: demo test lint gpu

demo: $(INSTALLED)
	$(BIN)/torchrun train.py --stage 2

test: $(INSTALLED)
	$(BIN)/pytest -q

# On a machine with an NVIDIA GPU, with its own python3, torch and pytest: nothing is installed.
gpu:
	python3 bench/gpu_gate.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/pyright

# The second form of venv is for systems that ship it without ensurepip (Debian's python3 without python3-venv).
$(INSTALLED): setup.py pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "make: no python3 of version 3.11 or newer found; give one: make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into .venv (once, a few minutes)"
	@$(PYTHON) -m venv .venv >/dev/null 2>&1 || { $(PYTHON) -m venv --without-pip --clear .venv \
		&& $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	@$(BIN)/python -m pip install -qq -c constraints.txt -e ".[dev]"
	@touch $@
