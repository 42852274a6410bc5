# Everything runs in VENV (.venv), which the first target to need it makes from the locks in requirements/. PYTHON=/path
# chooses the interpreter that makes it; the targets for a GPU run in that interpreter itself, where the packages are laid
# out already.

.DEFAULT_GOAL := help
.PHONY: help venv quickstart recipe-small test test-all fuzz campaign docs gpu-hour test-gpu bench-gpu test-transformers \
	test-versions peers lock lint format

export VENV ?= .venv
BIN := $(VENV)/bin
# Two files of tests at a time: most of a test with ranks is waiting for processes to start.
PARALLEL := -n 2 --dist loadfile --no-loadscope-reorder
# What the targets for a GPU need and run in.
ON_GPU := $(if $(PYTHON),,$(VENV)/.test)
GPU_PYTHON := $(or $(PYTHON),$(BIN)/python)

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

# One environment holds any of the sets, whose versions agree.
$(VENV)/.%: setup.py requirements/%-py312.txt requirements/%-py313.txt
	@tools/make_venv.sh $*

$(VENV)/.engine: requirements/engine-source.txt | $(VENV)/.test

venv: $(VENV)/.test $(VENV)/.engine ## make .venv, or VENV=, and install this project with all that the tests need

quickstart: $(VENV)/.quickstart ## shards, training, resume, export and captions, on this machine's CPU
	$(BIN)/python examples/quickstart/run.py

recipe-small: $(VENV)/.recipe-small ## the paper's three phases on a small LLM with real weights, on this machine's CPU
	$(BIN)/python examples/recipe_small/run.py

test: lint $(VENV)/.engine ## the default suite, as continuous integration runs it
	$(BIN)/python -m pytest -q $(PARALLEL)

test-all: lint $(VENV)/.engine ## the default suite and the slow tests
	$(BIN)/python -m pytest -q $(PARALLEL) -m ""

fuzz: $(VENV)/.test ## 100,000 damaged files of each kind, or NAVIL_FUZZ= so many; the default suite reads 1,000
	NAVIL_FUZZ=$${NAVIL_FUZZ:-100000} $(BIN)/python -m pytest -q --timeout 0 tests/fuzz

campaign: $(VENV)/.test ## faults on purpose, by subject: tried, survived, lost
	$(BIN)/python tools/campaign.py

docs: $(VENV)/.docs ## these pages and one of each module as a site, in build/docs; a warning is an error
	$(BIN)/sphinx-build -q -W --keep-going docs build/docs

gpu-hour: $(ON_GPU) ## all that needs a GPU, in half an hour, part by part into benchmarks/results
	$(GPU_PYTHON) tools/gpu_hour.py

test-gpu: $(ON_GPU) ## the tests that need a GPU; fails where there is none
	NAVIL_REQUIRE_CUDA=1 $(GPU_PYTHON) -m pytest -q -m gpu tests/gpu tests/engine

bench-gpu: $(ON_GPU) ## speed on a GPU, into benchmarks/results; fails where there is none
	$(GPU_PYTHON) tools/bench/gpu.py

test-transformers: $(VENV)/.test ## exported folders under the lowest and other transformers (downloads them)
	tools/test_transformers.sh 4.51.0 4.57.6 5.0.0

test-versions: $(VENV)/.test ## the core of the suite with the lowest and newest torch, megatron-core and transformers
	$(BIN)/python tools/test_versions.py

peers: $(VENV)/.peers ## install what the benchmarks measure against, beside all of the above

lock: $(VENV)/.test ## write requirements/ anew, by tools/lock.sh, which takes uv's options (--upgrade)
	tools/lock.sh

lint: $(VENV)/.test ## style, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.test ## rewrite the source in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
