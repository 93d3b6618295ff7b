# make demo: train a Linformer on real speeches.   make test: the whole test suite.   make quality: lint and types.
SHELL := /bin/bash
PYTHON ?= python3
BIN := .venv/bin
DATA := --train_file data/sotu/train.parquet --validation_file data/sotu/dev.parquet --label_column label_text
export TEXT

.PHONY: demo clean-demo test quality style

# Everything installs into .venv, at the versions of constraints.txt. Remove .venv to start afresh.
.venv/installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

# Training goes on where it was if it was killed.
demo/model.safetensors: | .venv/installed
	mkdir -p demo && rm -f demo/results.csv
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/baseline.py $(DATA) --results_file demo/results.csv
	HF_HUB_OFFLINE=1 $(BIN)/python scripts/finetune.py configs/demo.yaml --resume_from_checkpoint last \
	    --results_file demo/results.csv
	@echo && $(BIN)/python scripts/make_tables.py --results_file demo/results.csv && echo

# TEXT, or what is piped in within five seconds, or an example.
demo: demo/model.safetensors
	@if [[ -z "$$TEXT" && -p /dev/stdin ]]; then IFS= read -r -d '' -t 5 TEXT || true; fi; \
	TEXT=$${TEXT:-The Soviet Union has put a man into space, and inflation at home takes the bread from our tables.}; \
	echo "$$TEXT" && HF_HUB_OFFLINE=1 $(BIN)/python scripts/classify.py --model_name_or_path demo --top_k 5 "$$TEXT"

clean-demo:
	rm -rf demo

test: .venv/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --dist loadgroup

quality: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	mkdir -p .cache/types && ln -sfn ../.. .cache/types/hf_linformer
	$(BIN)/mypy .cache/types/hf_linformer/__init__.py scripts/*.py

style: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
