# Every target sets up what it needs in .venv (git-ignored) and runs from a fresh clone.
VENV := .venv
BIN := $(VENV)/bin

.PHONY: quickstart test bench lint format clean

quickstart: $(VENV)/.ready
	$(BIN)/python -m mhc_megatron quickstart

test: $(VENV)/.ready
	$(BIN)/python -m pytest $(PYTEST_ARGS)

bench: $(VENV)/.ready
	$(BIN)/python kernels/benchmarks/boundary.py $(BENCH_ARGS)

lint: $(VENV)/.ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.ready
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(VENV)/.ready: pyproject.toml .ci/constraints.txt .ci/find-python
	python=$$(.ci/find-python) && "$$python" -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint .ci/constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) quickstart-run
