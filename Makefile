# Every target works from a fresh clone with nothing but python3 (3.11+) and make.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One thread: on small shared machines torch's threads wait for each other at every operation.
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false
# Test processes: one per core, but each takes about 1 GB of memory.
JOBS ?= $(shell $(PYTHON) -c "import os; print(min(os.cpu_count() or 1, 4))")

.PHONY: help test test-min wheel demo record lint format bench bench-gpu clean

help:
	@echo "make test    run the test suite"
	@echo "make test-min  the same with the oldest versions that pyproject.toml allows"
	@echo "make demo    train a small memory model and question it at a million tokens (about 10 minutes)"
	@echo "make record  train the model of qa1 to qa5, and question it at up to 50 million tokens (on an accelerator; hours without)"
	@echo "make lint    style, types and layering"
	@echo "make wheel   build the wheel, install it elsewhere and import every public name"
	@echo "make bench   side-by-side measurements, written to benchmarks/results"
	@echo "make bench-gpu  the tests for accelerators, then the measurements there"

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

# Both commands go on where they were stopped, so that slices of ten minutes do. Smaller: make record SAMPLES=2 LENGTHS="0k 1M"
# TRAIN=training.max_steps=10 RECORD=runs/small
RECORD ?= runs/record
LENGTHS ?= 0k 1M 10M 50M
SAMPLES ?= 100
record: $(VENV)/installed
	$(BIN)/memlm train babilong/qa1-5 --out $(RECORD) $(TRAIN)
	$(BIN)/memlm eval $(RECORD) --tasks qa1 qa2 qa3 qa4 qa5 --lengths $(LENGTHS) --samples $(SAMPLES) --seed 1 \
		--max-new-tokens 4 --batch-size $(SAMPLES) --composition published --out $(RECORD)/answers

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Some hours on one core. Each script takes `--help`.
bench: $(VENV)/installed
	$(BIN)/python benchmarks/mechanisms.py
	$(BIN)/python benchmarks/mechanisms.py --against base --no-peaks --memory none --memory armt --memory rmt \
		--out benchmarks/results/overhead.json
	$(BIN)/python benchmarks/generation.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/training.py
	$(BIN)/python benchmarks/long_context.py
	$(BIN)/python benchmarks/index_size.py

# Everything a machine with an accelerator has to say, tests first; results go beside those of the CPU.
GPU := --device cuda
BIG := $(GPU) --dtype bfloat16 --hidden 2048 --layers 16 --vocab 32000
bench-gpu: $(VENV)/installed
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/mechanisms.py $(BIG) --out benchmarks/results/mechanisms-gpu.json
	$(BIN)/python benchmarks/mechanisms.py $(BIG) --against base --no-peaks --memory none --memory armt --memory rmt \
		--out benchmarks/results/overhead-gpu.json
	$(BIN)/python benchmarks/generation.py $(BIG) --out benchmarks/results/generation-gpu.json
	$(BIN)/python benchmarks/scaling.py $(GPU) --out benchmarks/results/scaling-gpu.json
	$(BIN)/python benchmarks/training.py $(BIG) --out benchmarks/results/training-gpu.json
	$(BIN)/python benchmarks/long_context.py $(BIG) --lengths 4k,16k,64k,256k,1M \
		--out benchmarks/results/long_context-gpu.json

clean:
	rm -rf $(VENV) .venv-min demo-run build dist .pytest_cache .mypy_cache .ruff_cache
