# make demo    the whole story on the bundled model, on a CPU
# make test    lint, types and tests, exactly what CI runs; ARGS="-k grid" or ARGS=--slow goes to pytest
# make lint    formatting, lint and types only
# make format  rewrite the sources in the house style
# make clean   remove the environment and everything generated
#
# Everything is installed into .venv by the first target that needs it. PYTHON=python3.12 picks the interpreter.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test lint format clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: $(INSTALLED)
	@$(BIN)/paro demo $(ARGS)

test: lint
	$(BIN)/python -m pytest $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) paro-demo build dist .pytest_cache .ruff_cache
	find src tests training benchmarks -name __pycache__ -prune -exec rm -rf {} +

$(INSTALLED): pyproject.toml constraints.txt
	@command -v "$(PYTHON)" >/dev/null || { echo "paroattn needs Python 3.11 or newer; $(PYTHON) was not found. Give one with: make PYTHON=python3.12" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "paroattn needs Python 3.11 or newer; got %d.%d. Give one with: make PYTHON=python3.12" % sys.version_info[:2])'
	@echo "Installing paroattn and PyTorch into $(VENV). This takes a minute or two, once."
	@test -x $(BIN)/pip || "$(PYTHON)" -m venv --clear $(VENV)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test]'
	@touch $@
