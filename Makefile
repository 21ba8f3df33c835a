# `make demo` and `make test` need only python3.11+, pip and make: the first call installs into .venv.

PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
INSTALLED := .venv/.installed
VLLM_INSTALLED := .venv-vllm/.installed
DEVICE_TRITON := .venv/triton-3.6.0
OLD_TRANSFORMERS := .venv/transformers-5.17.0

.PHONY: demo test test-vllm test-triton test-transformers lint gpu

demo: $(INSTALLED)
	$(BIN)/torchrun train.py --stage 2

# Two processes, each a core and 2 GB. By whole files: one that is split makes its fixtures, whole runs, twice.
test: $(INSTALLED)
	$(BIN)/pytest -q -n 2 --dist loadfile

# Judges' client and rollouts against real vLLM servers on the CPU, which live in an environment of its own.
test-vllm: $(INSTALLED) $(VLLM_INSTALLED)
	$(BIN)/pytest -q -m vllm tests/test_vllm.py tests/test_vllm_rollout.py

# All kernels compiled by the Triton of torch 2.11 too, which GPU images still carry; `make test` takes the pinned one.
test-triton: $(INSTALLED) $(DEVICE_TRITON)
	PYTHONPATH=$(DEVICE_TRITON) $(BIN)/pytest -q tests/test_compile.py

# What meets transformers, by the oldest release that setup.py admits, with which vLLM's and older GPU images can agree.
test-transformers: $(INSTALLED) $(OLD_TRANSFORMERS)
	PYTHONPATH=$(OLD_TRANSFORMERS) $(BIN)/pytest -q tests/test_load.py tests/test_folder.py tests/test_template.py \
		tests/test_policy.py tests/test_hf.py tests/test_cache.py tests/test_weights.py tests/test_collate.py tests/test_wire.py

# On a machine with an NVIDIA GPU, with its own python3, torch and pytest: nothing is installed.
gpu:
	python3 bench/gpu_gate.py

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/pyright

# The second form of venv is for systems that ship it without ensurepip (Debian's python3 without python3-venv).
define VENV
	@test -n "$(PYTHON)" || { echo "make: no python3 of version 3.11 or newer found; give one: make PYTHON=/path/to/python"; exit 1; }
	@echo "Installing into $(1) (once, a few minutes)"
	@$(PYTHON) -m venv $(1) >/dev/null 2>&1 || { $(PYTHON) -m venv --without-pip --clear $(1) \
		&& $(PYTHON) -m pip --python $(1)/bin/python install -q pip; }
endef

$(INSTALLED): setup.py pyproject.toml constraints.txt
	$(call VENV,.venv)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e ".[dev]"
	@touch $@

$(DEVICE_TRITON): $(INSTALLED)
	@$(BIN)/python -m pip install -qq --no-deps --target $@ triton==3.6.0
	@touch $@

$(OLD_TRANSFORMERS): $(INSTALLED)
	@$(BIN)/python -m pip install -qq --no-deps --target $@ transformers==5.17.0 huggingface_hub==1.33.0 httpx==0.28.1 \
		httpcore==1.0.9 certifi==2026.10.18
	@touch $@

$(VLLM_INSTALLED): requirements-vllm.txt
	$(call VENV,.venv-vllm)
	@.venv-vllm/bin/python -m pip install -qq --no-deps -r requirements-vllm.txt
	@touch $@
