# `make demo` sets up and runs the main job; `make test` sets up and runs every check.
# Both make their own environment in $(VENV) and need nothing but Python 3.11 or later, make and pip.

VENV ?= .venv
# The first of these names that is a Python TensorFlow has wheels for.
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3 python; do \
	if $$name -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		2>/dev/null; then echo $$name; break; fi; done)
WORKERS ?= 2
DEMO_FLAGS ?=

bin := $(VENV)/bin
export KERAS_BACKEND := tensorflow
export TF_CPP_MIN_LOG_LEVEL ?= 3
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help demo test check lint format types tests tests-fast install install-dev clean

help:
	@echo "make demo         grow a small network on digits; writes saved_models/digits-vgg/ (under 3 minutes)"
	@echo "make test         lint, types and all tests (about 15 minutes)"
	@echo "make tests-fast   the tests that are not marked slow, and the docstrings' examples"
	@echo "make lint types   ruff and mypy        make format   let ruff rewrite the code"
	@echo "make clean        remove $(VENV) and the tools' caches"
	@echo "Variables: VENV=$(VENV) PYTHON=$(PYTHON) WORKERS=$(WORKERS) DEMO_FLAGS=$(DEMO_FLAGS)"

demo: install
	$(bin)/python -m experiments.grow --overwrite $(DEMO_FLAGS)

# One after the other even under `make -j`: pytest's closing line comes last.
test:
	@$(MAKE) --no-print-directory check
	@$(MAKE) --no-print-directory tests

check: lint types

lint: install-dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .

format: install-dev
	$(bin)/ruff check --fix .
	$(bin)/ruff format .

types: install-dev
	$(bin)/mypy

# Everything in one run: conftest.py puts the slow tests last, and the workers take one test at a time.
tests: install-dev
	$(bin)/python -m pytest -m "" -n $(WORKERS) --maxschedchunk=1 --durations=10 -q

tests-fast: install-dev
	$(bin)/python -m pytest -n $(WORKERS) -q

# Installing is skipped while the stamp is newer than pyproject.toml. The dev environment holds
# all that the demo's does, so either will do for the demo.
install: $(if $(wildcard $(bin)/.installed-dev),$(bin)/.installed-dev,$(bin)/.installed-experiments)
install-dev: $(bin)/.installed-dev

$(bin)/.installed-%: pyproject.toml
	@test -n "$(PYTHON)" || { echo "tfgrow needs Python 3.11, 3.12 or 3.13 and found none: say PYTHON=/path/to/python" >&2; exit 1; }
	test -x $(bin)/python || $(PYTHON) -m venv $(VENV)
	$(bin)/python -m pip install --quiet --editable ".[$*]"
	@touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache .hypothesis tfgrow.egg-info
