# Every target works from a fresh clone with nothing but python3 (3.11+) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread: on small shared machines torch's threads wait for each other at every operation.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Test processes: one per core, but each takes about 1 GB of memory.
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(os.cpu_count() or 1, 4))")

.PHONY: help test test-min wheel demo lint format bench clean

help:
	@echo "make test    run the test suite"
	@echo "make test-min  the same with the oldest versions that pyproject.toml allows"
	@echo "make demo    train a small memory model and question it at a million tokens (about 15 minutes)"
	@echo "make lint    style, types and layering"
	@echo "make wheel   build the wheel, install it elsewhere and import every public name"
	@echo "make bench   side-by-side measurements, written to benchmarks/results"

# torch comes first and alone: a CPU build already on the machine, or already chosen, is then kept.
$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check "$$(grep '^torch==' constraints.txt)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

test: $(VENV)/installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

# The oldest of everything; torch is given by the caller where its own index has the build that is wanted.
TORCH_MIN ?= torch==$(shell sed -n 's/.*"torch>=\([0-9.]*\)".*/\1/p' pyproject.toml)
test-min:
	$(PYTHON) -m venv .venv-min
	.venv-min/bin/python -m pip install --quiet "$(TORCH_MIN)"
	.venv-min/bin/python .ci/lowest.py --except torch > .venv-min/lowest.txt
	.venv-min/bin/python -m pip install --quiet -r .venv-min/lowest.txt pytest pytest-xdist hypothesis
	.venv-min/bin/python -m pip install --quiet --no-deps -e .
	.venv-min/bin/python -m pytest -n $(JOBS) --dist loadgroup $(ARGS)

wheel: $(VENV)/installed
	$(BIN)/python .ci/check_wheel.py

demo: $(VENV)/installed
	$(BIN)/memlm demo $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/installed
	$(BIN)/python benchmarks/overhead.py $(ARGS)
	$(BIN)/python benchmarks/mechanisms.py $(ARGS)

clean:
	rm -rf $(VENV) .venv-min demo-run build dist .pytest_cache .mypy_cache .ruff_cache
