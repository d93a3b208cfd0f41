# One command each; every target sets itself up in .venv (a second call is quick).
#
#   make demo     distil a five-evaluation sampler and compare it with handcrafted ones (CPU)
#   make test     the tests that run without a GPU, but for the slow ones
#   make test-all the slow ones too (every pipeline, a thousand configs), on several Pythons and torches
#   make wheel    one wheel, installed into a fresh environment and tried
#   make lint     ruff, mypy --strict, clang-format
#   make bench    per-step latency of the engine against diffusers' schedulers
#   make gpu      correctness and speed of the GPU kernels (needs an NVIDIA GPU)
#   make docs     the documentation site, in site/
#
# Variables: PYTHON=python3.12, TORCH='torch==2.13.0', VENV=.venv, ARGS='more options',
# MATRIX='--python 3.13 --torch newest' (make test-all).

PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV ?= .venv
ARGS ?=
# one test process a core; files stay whole, so that what a module builds is built once
PARALLEL ?= -n auto --dist loadfile --durations=20
export PYTHON TORCH

BIN := $(VENV)/bin
NATIVE := $(shell find csrc kernels -type f \( -name '*.cpp' -o -name '*.h' -o -name '*.hpp' \
            -o -name '*.cu' -o -name '*.cuh' \) 2>/dev/null)
INPUTS := pyproject.toml CMakeLists.txt scripts/bootstrap.sh $(NATIVE)

# The dev environment holds everything the demo needs.
DEV := $(VENV)/.stamp-dev
DEMO := $(if $(wildcard $(DEV)),$(DEV),$(VENV)/.stamp-demo)

.DEFAULT_GOAL := help
.PHONY: help dev demo test test-all wheel lint format bench gpu docs clean

help:
	@sed -n '3,12s/^# \{0,3\}//p' Makefile

$(VENV)/.stamp-%: $(INPUTS)
	@scripts/bootstrap.sh $(VENV) $*
	@touch $@

dev: $(DEV)

demo: $(DEMO)
	$(BIN)/dlms demo $(ARGS)

test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# the environments of the other versions are made in .matrix/ and kept
test-all: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(PARALLEL) -m "slow or not slow" $(ARGS)
	$(BIN)/python scripts/test_matrix.py $(MATRIX)

wheel:
	scripts/wheel.sh dist

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy --strict python/dlms_engine
	$(BIN)/mypy --strict kernels
	$(BIN)/clang-format --dry-run -Werror $(NATIVE)

format: $(DEV)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(NATIVE)

bench: $(DEV)
	$(BIN)/dlms bench step $(ARGS)

gpu: $(DEV)
	VENV=$(VENV) bash scripts/gpu_check.sh $(ARGS)

docs: $(VENV)/.stamp-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict $(ARGS)

clean:
	rm -rf $(VENV) .matrix build dist site .pytest_cache .mypy_cache .ruff_cache
