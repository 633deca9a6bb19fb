# Two commands set up everything on a bare Debian or Ubuntu with python3 >= 3.11 and python3-venv: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: help venv demo test test-slow bench lint docs clean

help:
	@echo "make demo       compile an example model and measure it"
	@echo "make test       the test suite (minutes)"
	@echo "make test-slow  sanitizers, large files, old ONNX Runtimes"
	@echo "make bench      races against other engines, and README.md's tables"
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
	$(BIN)/python -m pytest -q -m "not slow and not peers"

test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -q -m "slow and not peers"

bench: $(VENV)/ready
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[bench]'
	$(BIN)/python -m pytest -q -m peers
	$(BIN)/python tests/peers/tables.py

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry spa_compiler

docs: $(VENV)/ready
	$(BIN)/python -m spa_compiler.passes.catalogue docs/recipes.md

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
