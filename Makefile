# One command each; `make` alone lists them. PYTHON chooses the interpreter that the virtual environment is made from.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
OUT ?= runs/quickstart
STAMP := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow lint mutation faults properties fuzz audit format docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	@# torch first and alone: whatever build the index offers is then what everything else is fitted to.
	$(BIN)/python -m pip install --quiet -c constraints.txt torch
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	@# natten builds against the torch that is there; pip's isolated build would fetch another one.
	$(BIN)/python -m pip install --quiet setuptools wheel
	$(BIN)/python -m pip install --quiet --no-build-isolation -c constraints.txt natten \
		|| echo "natten could not be installed; everything works without it, see: $(BIN)/mvar doctor"
	touch $@

install: $(STAMP)  ## virtual environment with everything in it

quickstart: $(STAMP)  ## from bundled images to samples, measures and a report
	$(BIN)/mvar quickstart --out $(OUT)

lint: $(STAMP)  ## what CI checks without running anything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint  ## lint, types, and all quick tests, a process for each core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n auto --maxprocesses 8 --dist loadfile

test-slow: $(STAMP)  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow

mutation: $(STAMP)  ## faults put into the code, and whether the tests notice; ARGS="--only 3,17"
	$(BIN)/python benchmarks/mutation.py $(ARGS)

faults: $(STAMP)  ## bad inputs, kills and full disks, and how every command ends; ARGS="--only kills"
	$(BIN)/python benchmarks/faults.py $(ARGS)

properties: $(STAMP)  ## 2,000 examples of every property; ARGS="-k backends"
	OMP_NUM_THREADS=1 MVAR_EXAMPLES=2000 $(BIN)/python -m pytest tests/properties/test_models.py tests/properties/test_layouts.py tests/properties/test_archives.py -n auto $(ARGS)

fuzz: $(STAMP)  ## ten minutes of every fuzzer; ARGS="-k tar"
	OMP_NUM_THREADS=1 MVAR_FUZZ_SECONDS=600 $(BIN)/python -m pytest tests/properties/test_fuzz.py -n auto $(ARGS)

audit: $(STAMP)  ## installed packages with known vulnerabilities; asks a network service
	$(BIN)/python -m pip_audit --skip-editable $(ARGS)

format: $(STAMP)  ## bring the code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)  ## write the generated pages: commands, recipes, costs of large images
	$(BIN)/python docs/generate.py

clean:  ## remove the virtual environment and caches, never runs
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache
