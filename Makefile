# Two commands do everything on a fresh machine with Python 3.11+ and make:
#   make demo    fine-tunes real experts of a real model, merges them, evaluates every output file
#   make test    runs the tests
PYTHON ?= python3
BIN := .venv/bin
# Three workers (of two cores' time a third is waiting for processes), a file of tests at a time, in the order that
# tests/turns.py gives; what measures runs alone.
PYTEST := $(BIN)/python -m pytest -q -n 3 --dist loadfile --no-loadscope-reorder
PIP := -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

# torch's OpenMP threads spin while they wait; on a busy machine that makes a fine-tuning step 5 to 8 times slower.
export OMP_WAIT_POLICY ?= passive

.PHONY: demo test check test-all drill drill-ray families simulate bench bench-device paper paper-quick clean

demo: .venv/installed
	$(BIN)/python examples/quickstart/run.py

test: .venv/installed .venv-mergekit/installed
	$(PYTEST) -m "not long"

check: .venv/installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(MAKE) test

# All there is to test, before a release; about an hour and a half.
test-all: .venv/installed .venv-mergekit/installed
	$(PYTEST)
	$(MAKE) families drill drill-ray simulate

# 35 families of models, saved by both versions of transformers, each stored in three ways; about 5 minutes.
families: .venv/installed .venv-transformers4/installed
	$(BIN)/python tests/families/save.py build/families/5
	.venv-transformers4/bin/python tests/families/save.py build/families/4
	$(PYTEST) tests/families --families build/families

# 100 merges, each killed several times at random moments; about 15 minutes.
drill: .venv/installed
	$(BIN)/python -m tests.drills.kill_drill --runs 100 --report

# 100,000 schedules of dying workers, drivers and disks under a fake clock; about 40 minutes on two cores.
simulate: .venv/installed
	$(BIN)/python -m tests.simulation.run --schedules 100000 --report

# 200 merges on a Ray cluster of this machine, whose workers, nodes and drivers fail at random; about 20 minutes.
drill-ray: .venv/installed
	$(BIN)/python -m tests.drills.ray_drill --runs 200 --report

# The paper's claims, on twelve text tasks and (the whole) with a second base model and on twelve tasks of images; the
# whole takes hours on two cores and 30 GB of disk.
paper-quick: .venv/installed
	$(BIN)/python $(PIP) --editable '.[demo,paper]'
	$(BIN)/python -m benchmarks.paper.run --quick --report

# Of trdg the fonts are wanted; what it depends on draws documents.
paper: .venv/installed
	$(BIN)/python $(PIP) --editable '.[demo,paper]'
	$(BIN)/python $(PIP) --no-deps trdg
	$(BIN)/python -m benchmarks.paper.run --report

# Against mergekit on TinyLlama-1.1B shapes, with the ceiling measured in the same run; needs 14 GB of disk.
bench: .venv/installed .venv-mergekit/installed
	$(BIN)/python -m benchmarks.vs_peers --report

# What a machine with a GPU and many cores can tell, in eight minutes, by any Python with torch and numba: no network, no
# environment of ours, missing packages from build/wheels (benchmarks/device.md).
bench-device:
	$(PYTHON) -m benchmarks.device --out build/device

# Of fusion-bench one file judges a test; what it depends on is a training framework.
.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python $(PIP) --upgrade pip setuptools
	$(BIN)/python $(PIP) --editable '.[demo,test,lint]'
	-$(BIN)/python $(PIP) --no-deps fusion-bench
	touch $@

# mergekit has dependencies of its own; where it cannot be installed, its conformance tests are skipped and say so.
.venv-mergekit/installed: constraints.txt
	$(PYTHON) -m venv .venv-mergekit
	-.venv-mergekit/bin/python $(PIP) mergekit
	touch $@

# transformers as it was before version 5, which named and tied things otherwise.
.venv-transformers4/installed: constraints.txt
	$(PYTHON) -m venv .venv-transformers4
	grep -E '^(torch|numpy|safetensors)==' constraints.txt > .venv-transformers4/constraints.txt
	.venv-transformers4/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint .venv-transformers4/constraints.txt 'transformers==4.57.6' torch
	touch $@

clean:
	rm -rf .venv .venv-mergekit .venv-transformers4 build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
