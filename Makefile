# Everything a fresh machine needs: `make demo` and `make test` set up first. PYTHON chooses the interpreter.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.luthier-installed
PYTEST := $(BIN)/python -m pytest

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast test-long test-gpu check bench soak format clean

help:
	@echo "make setup   virtual environment in $(VENV) with Luthier and its tools (once; the others call it)"
	@echo "make demo    five strategies on two small networks and real digits"
	@echo "make test-fast  an answer in two minutes: no Ray, no tracking server"
	@echo "make test    all tests but the longest"
	@echo "make test-long  real studies killed, starved and stopped: another quarter of an hour"
	@echo "make test-gpu   what runs on a machine with a GPU, PyTorch, timm and pytest alone (PYTHON; no setup)"
	@echo "make check   formatting, lint, types"
	@echo "make bench   the measurements behind the README's figures"
	@echo "make soak    a study through thirty faults and more, and plain Ray Tune through the same (half an hour)"

setup: $(STAMP)

# The stamp is renewed when pyproject.toml changes. One pip call, so that torch and torchvision come as a pair.
$(STAMP): pyproject.toml
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 11))" || \
	  { echo "Luthier needs Python 3.11 or newer, but $(PYTHON) is $$($(PYTHON) --version 2>&1). Set PYTHON=…"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet --editable ".[dev]"
	@touch $@

demo: setup
	$(BIN)/luthier demo

# Two at a time, a file never split: a module shares the cluster that it starts. Slow modules first (tests/conftest.py).
test: setup
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m "not long"

# Left out: what starts Ray or a server, what takes seconds, and most of the networks of timm.
FAST := not ray and not server and not slow and not thorough and not sweep and not long

test-fast: setup
	$(PYTEST) -n 2 --dist loadfile -m "$(FAST)"

test-long: setup
	$(PYTEST) -n 2 --dist loadfile --no-loadscope-reorder -m long

# Without `setup`: such a machine has its own PyTorch, and perhaps no network. OMP: one thread per worker.
test-gpu:
	OMP_NUM_THREADS=1 $(PYTHON) -m pytest -n auto --dist loadfile --skip-missing \
	  -m "not ray and not server and not slow and not long" tests/trainables tests/search_spaces

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	@for script in $(BENCHMARKS); do echo "== $$script"; $(BIN)/python -m $$script || exit 1; done

BENCHMARKS = $(patsubst benchmarks/%.py,benchmarks.%,\
  $(filter-out benchmarks/_% benchmarks/golden.py benchmarks/soak.py,$(wildcard benchmarks/*.py)))

# Not part of `make bench` and not in CI: it takes long, and wants both cores for itself.
soak: setup
	$(BIN)/python -m benchmarks.soak

format: setup
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache
