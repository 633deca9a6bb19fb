# Two commands set up everything on a bare Debian or Ubuntu with python3 >= 3.11 and python3-venv: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
# An environment of its own for a peer of `make bench`; DEEPSPARSE=none does without it.
DEEPSPARSE ?= .venv-deepsparse
BIN := $(VENV)/bin

.PHONY: help venv demo test test-slow cuda-kernels test-cuda-kernels test-cuda bench deepsparse lint docs clean

help:
	@echo "make demo       compile an example model and measure it"
	@echo "make test       the test suite (minutes)"
	@echo "make test-slow  sanitizers, other processors under qemu, large files, old ONNX Runtimes"
	@echo "make bench      races against other engines, README.md's tables, docs/peers.md and docs/roofline.md; hours"
	@echo "make cuda-kernels       packs CUDA kernels into build/cuda-kernels.zip, for machines without TVM"
	@echo "make test-cuda-kernels  checks and times what is in there on this machine's GPU, against cuBLAS"
	@echo "make test-cuda          whole models under onnxruntime-gpu: GPU_PYTHON has it"
	@echo "make lint       ruff, mypy, import-linter, deptry"

venv: $(VENV)/ready

# A stamp file: without python3-venv, `python -m venv` fails but leaves bin/python behind.
$(VENV)/ready: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "spa-compiler needs Python 3.11 or newer; $(PYTHON) is $$($(PYTHON) -V 2>&1). Name another: make PYTHON=python3.12" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "Python cannot make virtual environments. On Debian and Ubuntu: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install -q --no-compile --disable-pip-version-check -c constraints.txt -e '.[cpu,test]'
	@touch $@

demo: $(VENV)/ready
	$(BIN)/python models/demo.py

test: $(VENV)/ready
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow and not peers and not gpu"

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -q -m "slow and not peers and not gpu"

# Machine code comes from nvcc, else from NVRTC's wheel; no GPU is needed.
cuda-kernels: $(VENV)/ready
	$(BIN)/python tests/gpu/pack.py build/cuda-kernels.zip

# Needs numpy, and NVIDIA's driver: GPU_PYTHON may have torch, whose cuBLAS is then the one to beat. Where there is no GPU, it
# says SKIPPED and succeeds.
GPU_PYTHON ?= $(PYTHON)
test-cuda-kernels:
	@test -f build/cuda-kernels.zip || { echo "there is no build/cuda-kernels.zip: make cuda-kernels, here or elsewhere" >&2; exit 1; }
	$(GPU_PYTHON) tests/gpu/kernels.py build/cuda-kernels.zip --json build/cuda-kernels.json

# GPU_PYTHON is an environment with this project, its test extra and onnxruntime-gpu in the place of onnxruntime.
test-cuda:
	$(GPU_PYTHON) -m pytest -q -s -rs -m gpu tests/gpu

bench: $(VENV)/ready deepsparse
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python tests/peers/tables.py
	$(BIN)/python tests/peers/roofline.py
	$(BIN)/python tests/peers/peers_race.py --python deepsparse=$(DEEPSPARSE)/bin/python
	$(BIN)/python -m pytest -q -m peers

# DeepSparse needs numpy below 2 and a Python below 3.12. Where it cannot be had, the race goes on without it, and says so.
deepsparse:
	@test "$(DEEPSPARSE)" = none || $(DEEPSPARSE)/bin/python -c 'import deepsparse' 2>/dev/null || { \
	echo "DeepSparse's own licence: evaluation in development and testing only. DEEPSPARSE=none leaves it out."; \
	for python in python3.11 python3.10 python3.9 $(PYTHON) none; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info >= (3, 12))' 2>/dev/null && break; done; \
	$$python -m venv --clear $(DEEPSPARSE) \
	&& $(DEEPSPARSE)/bin/python -m pip install -q --no-compile --disable-pip-version-check deepsparse==1.8.0 'numpy<2' \
	&& $(DEEPSPARSE)/bin/python -c 'import deepsparse' \
	|| echo "SKIPPED: DeepSparse cannot be installed here; it needs Python 3.9 to 3.11 with venv, and its wheels" >&2; }

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry spa_compiler

docs: $(VENV)/ready
	$(BIN)/python -m spa_compiler.passes.catalogue docs/recipes.md

clean:
	rm -rf $(VENV) $(DEEPSPARSE) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
