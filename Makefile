# make setup   CPU machine (uv if on PATH, else pip)        make setup-cuda   GPU machine
# On a machine without a local wheel folder: TORCH_CPU_INDEX="--extra-index-url <PyTorch's CPU wheel index>"
PY ?= $(firstword $(foreach v,3.11 3.12 3.13 3.14,$(shell command -v python$(v))) python3)
VENV ?= .venv
ROUNDS ?= 4
TORCH_CPU_INDEX ?=
BIN := $(VENV)/bin
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
UV := $(shell command -v uv 2>/dev/null)
ifdef UV
MKVENV = uv venv -q --clear --python $(PY) $(VENV)
INST = uv pip install -q --python $(BIN)/python
COMPILE = --compile-bytecode
TORCH_FLAGS = $(TORCH_CPU_INDEX) $(if $(TORCH_CPU_INDEX),--index-strategy unsafe-best-match)
else
MKVENV = $(PY) -m venv --clear $(VENV)
INST = $(BIN)/python -m pip install -q --disable-pip-version-check
COMPILE =
TORCH_FLAGS = $(TORCH_CPU_INDEX)
endif

.DEFAULT_GOAL := all
.PHONY: all help setup setup-cuda demo test lint types layers tests test-gpu bench-train bench-dataflow chaos fuzz docs lock

all: setup lint types layers tests  ## set up, lint, types, import layers, tests (the default)

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:[^#]*  ## /\t/' | expand -t 14

setup: $(VENV)/ready  ## environment with the CPU build of vLLM in .venv

$(VENV)/ready: requirements/cpu.txt pyproject.toml
	@start=$$(date +%s); $(MKVENV) && \
	$(INST) --no-deps $(COMPILE) $(TORCH_FLAGS) -r requirements/cpu.txt && \
	$(INST) --no-deps --no-build-isolation -e . && \
	touch $@ && echo "set-up took $$(( $$(date +%s) - start )) s"

setup-cuda:  ## environment with the CUDA build of vLLM (Linux, NVIDIA GPU)
	$(MKVENV) && $(INST) -c requirements/cuda.txt -e '.[vllm,dev]' && touch $(VENV)/ready

demo: setup  ## set up, then four rounds of self-improvement on the embedded default
	@start=$$(date +%s); $(BIN)/selfimprove iterate --rounds $(ROUNDS) && \
	echo "the run took $$(( $$(date +%s) - start )) s; look at it: $(BIN)/selfimprove report default"

test: all  ## every check and test, as `make` alone does

lint:
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types:
	$(BIN)/mypy

layers:
	$(BIN)/lint-imports --no-cache

tests:
	$(BIN)/python -m pytest

test-gpu:  ## the tests that need an NVIDIA GPU
	SELFIMPROVE_GPU=1 $(BIN)/python -m pytest -n0 tests/gpu

CASES ?= 10000
FUZZ ?=
fuzz: setup  ## bad input: recipes, data files, artifacts (CASES=10000 FUZZ="--seed 1 --first 5000")
	$(BIN)/python -m tests.fuzz --recipes $(CASES) --files $(CASES) --artifacts $$(( $(CASES) / 10 )) $(FUZZ)

REPEATS ?= 5
VOCAB ?= 1024 32768
BENCH_ENV = HF_HUB_OFFLINE=1 TQDM_DISABLE=1 TOKENIZERS_PARALLELISM=false
bench-train: setup  ## our training step beside TRL's (OUT=FILE.json REPEATS=5 VOCAB="1024 32768")
	$(BENCH_ENV) $(BIN)/python -W ignore -m tests.bench.train --repeats $(REPEATS) --vocab $(VOCAB) $(if $(OUT),--out $(OUT))

ROWS ?= 10000 100000
WORKERS ?= 2
bench-dataflow: setup  ## rows/s and memory from keywords to pairs, of ROWS="10000 100000" prompts (WORKERS=2 OUT=FILE.json)
	HF_HUB_OFFLINE=1 TQDM_DISABLE=1 $(BIN)/python -W ignore -m tests.bench.dataflow --workers $(WORKERS) --rows $(ROWS) $(if $(OUT),--out $(OUT))

COUNT ?= 200
CHAOS ?= /tmp/selfimprove-chaos
chaos: setup  ## kill runs of the default COUNT=200 times, then every drill at length (OUT=FILE.json; goes on where it was stopped)
	$(BIN)/python -m tests.chaos.kills --count $(COUNT) --folder $(CHAOS) $(if $(OUT),--out $(OUT))
	CHAOS_FULL=1 CHAOS_KILLS=40 CHAOS_READERS=50 $(BIN)/python -m pytest -n0 -s --timeout=3600 tests/chaos

docs: setup  ## regenerate docs/cli.md, docs/losses.md and docs/health.md
	$(BIN)/python docs/make_cli.py && $(BIN)/python docs/make_losses.py && $(BIN)/python docs/make_recipe.py && $(BIN)/python docs/make_health.py

# needs uv, and the torch CPU wheel in UV_FIND_LINKS
UVC = uv pip compile -q pyproject.toml --python-version 3.11 --no-annotate --custom-compile-command "make lock"
lock:  ## pin the dependencies anew (requirements/*.txt)
	$(UVC) --extra cpu --extra dev --excludes requirements/cpu-exclude.txt -o requirements/cpu.txt >/dev/null
	env -u UV_FIND_LINKS $(UVC) --extra vllm --extra dev -o requirements/cuda.txt >/dev/null
