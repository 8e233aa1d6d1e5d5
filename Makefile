# make quickstart   install, then run the whole corridor on the shipped emoji
# make test         install, then the tests
# make faults       kill and interrupt whole runs on Ray (not part of make test)
# make ui | lint | bench | claims

SHELL := /bin/bash
PYTHON ?= python3.11
BIN := .venv/bin
export DVC_NO_ANALYTICS := 1
export RAY_USAGE_STATS_ENABLED := 0
export RAY_ENABLE_UV_RUN_RUNTIME_ENV := 0
unexport PYTHONDONTWRITEBYTECODE

.PHONY: help install quickstart test faults ui lint bench claims lock clean

help:
	@sed -n 's/^# //p' Makefile

install: .venv/installed

# uv lives in a private environment of its own, so that nothing of the machine's Python is touched.
.uv/bin/uv:
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed: set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv .uv
	.uv/bin/python -m pip install --quiet --disable-pip-version-check uv

.venv/installed: requirements.lock pyproject.toml | .uv/bin/uv
	.uv/bin/uv venv --quiet --allow-existing --python $(PYTHON) .venv
	.uv/bin/uv pip install --quiet --python $(BIN)/python --require-hashes --compile-bytecode -r requirements.lock
	.uv/bin/uv pip install --quiet --python $(BIN)/python --no-deps --no-build-isolation --editable .
	@$(BIN)/python -m compileall -q platform
	@touch $@
	@echo "installed: $$($(BIN)/diptych --version); the command is $(BIN)/diptych"

quickstart: install
	$(BIN)/diptych run workflows/quickstart.yaml

test: install
	$(BIN)/python -m pytest -m "not faults"

# Kills and interrupts whole runs on Ray in the middle of every phase: seven minutes on two idle cores.
faults: install
	$(BIN)/python -m pytest -m faults

ui: install
	$(BIN)/diptych ui

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: install
	$(BIN)/python tests/benchmarks/run.py

claims: install
	@for claim in workflows/claims/*.yaml; do $(BIN)/diptych claim $$(basename $$claim .yaml) || exit 1; done

lock: | .uv/bin/uv
	.uv/bin/uv pip compile --quiet --generate-hashes --no-header --no-annotate --python-version 3.11 requirements.dev.in -o requirements.lock

clean:
	rm -rf .venv .uv runs mlruns mlflow.db
