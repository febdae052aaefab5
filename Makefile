# Everything runs in .venv, which each target builds for itself. Needs Python 3.11+, pip, make and git.
#   make PYTHON=python3.12 test     another Python for the virtual environment
#   make JOBS=8 test                more test processes (for some of its time a test waits)

PYTHON ?= python3
JOBS   ?= 3

BIN    := .venv/bin
# A Ctrl-C in the middle of an installation must not leave a stamp behind.
.DELETE_ON_ERROR:
.PHONY: help demo test lint types contracts check docs bench clean
.DEFAULT_GOAL := help

help:  ## This list
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):[^#]*## /  make \1\t/' | expand -t 20

# ---- the virtual environment ------------------------------------------------------------------

.venv/dev.stamp: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	    { echo "fallline needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.11 $(MAKECMDGOALS)" >&2; exit 1; }
	@test -x $(BIN)/python || { echo "==> new virtual environment in .venv ($$($(PYTHON) --version))"; $(PYTHON) -m venv .venv; }
	@echo "==> installing fallline and its tools (some hundred MB the first time)"
	@$(call INSTALL,dev)
	@touch $@

.venv/docs.stamp: .venv/dev.stamp
	@echo "==> installing what the documentation needs"
	@$(call INSTALL,docs)
	@touch $@

# One line for each package that is fetched; pip's own words go to .venv/install.log.
define INSTALL
set -o pipefail; $(BIN)/python -m pip install --disable-pip-version-check --no-input --progress-bar off \
    -c constraints.txt -e ".[$(1)]" 2>&1 | tee .venv/install.log \
  | sed -nuE -e 's/^ *(Downloading|Using cached) (.*\/)?([A-Za-z0-9_.]+-[0-9][^-]*)[^ ]*\.(whl|tar\.gz)( \(.*\))?$$/    \3\5/p' \
             -e 's/^Installing collected packages:.*/==> unpacking (a minute or two)/p' \
  || { tail -n 20 .venv/install.log >&2; echo "The installation failed; all of it is in .venv/install.log" >&2; exit 1; }
endef
SHELL := /bin/bash

# ---- what a newcomer runs ---------------------------------------------------------------------

demo: .venv/dev.stamp  ## Is it a minimum? The main job on real data; leaves a report in demo-report/
	@$(BIN)/python examples/is_it_a_minimum.py

# XLA's older emitters compile a fifth faster, and compiling is most of what the tests do.
test: .venv/dev.stamp  ## All tests
	@XLA_FLAGS=--xla_cpu_use_fusion_emitters=false JAX_ENABLE_X64=0 OPENBLAS_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --durations=10

# ---- what must hold before a change lands -----------------------------------------------------

check: lint types contracts  ## Lint, types and import contracts

lint: .venv/dev.stamp  ## Ruff: rules and layout
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; exit 1; }

types: .venv/dev.stamp  ## basedpyright
	@$(BIN)/basedpyright --pythonpath $(BIN)/python

contracts: .venv/dev.stamp  ## import-linter: who may import whom
	@$(BIN)/lint-imports --no-logo

docs: .venv/docs.stamp  ## The documentation, into docs/_build/html; warnings are errors
	@env -u MPLBACKEND $(BIN)/python -m sphinx -q -W --keep-going -d docs/_build/doctrees docs docs/_build/html
	@echo "docs/_build/html/index.html"

bench: .venv/dev.stamp  ## The benchmarks, one file after the other
	@set -e; for file in benchmarks/*.py; do echo "==> $$file"; $(BIN)/python "$$file"; done

clean:  ## Remove everything that was built, the virtual environment too
	@rm -rf .venv build dist demo-report docs/_build docs/_generated docs/jupyter_execute .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	@find src tests docs examples benchmarks -type d -name __pycache__ -prune -exec rm -rf {} + 2>/dev/null || true
