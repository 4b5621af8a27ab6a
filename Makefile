# Everything runs in .venv, which the first target that needs it makes.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test bench report lint format

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --constraint constraints.txt --editable ".[demo,test,bench]"
	touch $@

demo: .venv/installed
	$(BIN)/python bench/demo.py

test: .venv/installed
	$(BIN)/pytest --cov --cov-report=term-missing:skip-covered --cov-fail-under=90

bench: .venv/installed
	$(BIN)/pytest bench
	$(BIN)/python bench/report.py

# What every kernel compiles to, for every architecture: no GPU is needed.
report: .venv/installed
	$(BIN)/python -m fastbert_kernels.report > bench/results/compiled/README.md

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
