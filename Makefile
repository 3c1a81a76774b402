# make demo    the whole story on the bundled model, on a CPU
# make test    lint, types and tests, exactly what CI runs; ARGS="-k grid" or ARGS=--slow goes to pytest
# make oldest  tests that touch diffusers, with the oldest one that is supported; a part of make test without ARGS
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
TESTED := $(VENV)/.installed-for-tests
OLDEST := 0.38.0
OLD := $(VENV)/diffusers-$(OLDEST)
TOUCH_DIFFUSERS := $(addprefix tests/test_,$(addsuffix .py,calibrate compatibility compensation docs doctor fidelity_benchmark hub integration misuse models pipelines planned refining rotary sensitivity several whole_run worth))
SPREAD := $(if $(ARGS),,-n auto --maxprocesses 4 --dist loadfile)
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test oldest lint format clean
.DELETE_ON_ERROR:

help:
	@sed -n 's/^# \{0,1\}//p' Makefile

demo: $(INSTALLED)
	@$(BIN)/paro demo $(ARGS)

test: lint $(if $(ARGS),,$(OLD)/.installed)
	$(BIN)/python -m pytest $(SPREAD) $(ARGS)
	$(if $(ARGS),,$(MAKE) oldest)

oldest: $(OLD)/.installed
	PYTHONPATH=$(abspath $(OLD))$(if $(PYTHONPATH),:$(PYTHONPATH)) $(BIN)/python -m pytest --diffusers $(OLDEST) $(TOUCH_DIFFUSERS) -k "not killed" $(SPREAD) $(ARGS)

lint: $(TESTED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(TESTED)
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
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[video]'
	@touch $@

$(TESTED): $(INSTALLED)
	@$(BIN)/python -m pip install -qq -c constraints.txt -e '.[test]'
	@touch $@

$(OLD)/.installed: $(TESTED) Makefile
	@rm -rf $(OLD)
	@$(BIN)/python -m pip install -qq --no-deps --target $(OLD) diffusers==$(OLDEST) httpx==0.28.1 httpcore==1.0.9
	@touch $@
