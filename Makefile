# `make` alone lists the targets. What is installed goes to .venv; the demo lives in demo/. `make PYTHON=/path/to/python3.11 …` picks the interpreter.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# One thread a process unless told otherwise: tests and servers start several.
TEST_ENV := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help install demo bench gpu-check test check format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## .venv with the exact versions of requirements.lock, and the `peregrine` command

$(INSTALLED): requirements.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "error: requirements.lock is for Python 3.11, and '$(PYTHON)' is not that; cure: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation --editable .
	@touch $@

demo: install ## a generated shop, trained, served by a real Triton and asked: the whole path in a few minutes
	@builders/demo.sh demo

bench: install ## latency, throughput and cost of the demo's release, beside the same pipeline without a server
	@builders/demo.sh bench

REPOSITORY ?= demo/model_repository
gpu-check: install ## on a machine with a GPU: builds plans, checks and times engines, Faiss and the chain (REPOSITORY=…)
	@$(BIN)/python -m builders.bench.gpu_check --repository $(REPOSITORY) --json demo/gpu-check.json

test: install ## all tests that this machine can run; a skip says what is missing
	@command -v redis-server >/dev/null || echo "redis-server is not installed: tests marked redis will be skipped"
	@ldconfig -p 2>/dev/null | grep -q libb64 || echo "libb64 (Debian: libb64-0d) is not installed: the test of `bench` runs without perf_analyzer"
	$(TEST_ENV) $(BIN)/python -m pytest -rs $(PYTEST)

check: install ## ruff format, ruff, mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: install ## what `check` can repair by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: ## requirements.lock again, from pyproject.toml's extras and the versions in .venv
	$(BIN)/python .ci/lock.py requirements.lock

clean: ## remove the demo, caches and build leftovers; .venv and model_repository stay
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
