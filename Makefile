# make demo: fine-tune a Linformer on real speeches.   make test: the whole test suite.   make quality: lint and types.
PYTHON ?= python3
BIN := .venv/bin
TEXT ?=

.PHONY: demo test quality style tables clean-demo

# Everything installs into .venv, at the versions of constraints.txt. Remove .venv to start afresh.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=...")'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

test: .venv/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto

quality: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .cache/types && ln -sfn ../.. .cache/types/hf_linformer
	$(BIN)/mypy .cache/types/hf_linformer/__init__.py scripts/*.py

style: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
