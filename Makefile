# `make` alone lists the targets. What is installed goes to .venv; the demo lives in demo/. `make PYTHON=/path/to/python3.11 …` picks the interpreter.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
TOOLS := $(VENV)/.tools
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps
# The lock's second section begins with this comment.
SECOND := ^\# Tests and checks
# One thread a process unless told otherwise: tests and servers start several.
TEST_ENV := OMP_NUM_THREADS=1

.DEFAULT_GOAL := help
.PHONY: help install demo bench bench-shops gpu-check images rolling test test-long soak check format lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## .venv with what the demo needs, in the versions of requirements.lock, and the `peregrine` command

$(INSTALLED): requirements.lock pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	  { echo "error: requirements.lock is for Python 3.11, and '$(PYTHON)' is not that; cure: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	"$(PYTHON)" -m venv $(VENV)
	sed '/$(SECOND)/,$$d' requirements.lock > $(VENV)/install.lock
	$(PIP) -r $(VENV)/install.lock
	$(PIP) --no-build-isolation --editable .
	@touch $@

$(TOOLS): $(INSTALLED)
	sed '1,/$(SECOND)/d' requirements.lock > $(VENV)/tools.lock
	$(PIP) -r $(VENV)/tools.lock
	@touch $@

demo: install ## a generated shop, trained, served by a real Triton and asked: the whole path in a few minutes
	@builders/demo.sh demo

bench: install ## latency, throughput and cost of the demo's release, beside the same pipeline without a server
	@builders/demo.sh bench

SHOPS ?=
PRESET ?= base
OUT ?= demo/shops
AGAINST ?=
bench-shops: install ## whether real shops rank as well as before: builds each, compares (SHOPS="a b", OUT=…, AGAINST=…, PRESET=tiny)
	@$(BIN)/python -m builders.bench.shops $(SHOPS) --preset $(PRESET) --out $(OUT) $(if $(AGAINST),--against $(AGAINST))

REPOSITORY ?= demo/model_repository
gpu-check: install ## on a machine with a GPU: builds plans, checks and times engines, Faiss and the chain (REPOSITORY=…)
	@$(BIN)/python -m builders.bench.gpu_check --repository $(REPOSITORY) --json demo/gpu-check.json

images: install ## as root on Debian: both container images on a stand-in base, and a build, a server, a list inside them
	@docker/images.sh

ALL ?=
RUNS ?= 1
faults: install ## kills, stops and overloads a real server of the demo's release, both ways of serving (REPOSITORY=…, RUNS=5: the worst of five, ALL=1 for all)
	@PEREGRINE_AS_ROOT=1 $(BIN)/python -m clients.bench.starred --repository $(REPOSITORY) --json demo/faults.json --runs $(RUNS) $(if $(ALL),--all --seconds 5)

TO ?=
rolling: $(TOOLS) ## replaces two servers behind nginx under load, as Kubernetes would (REPOSITORY=…, TO=r2 turns to it on the way)
	@PEREGRINE_AS_ROOT=1 $(BIN)/python -m clients.bench.rolling --repository $(REPOSITORY) --json demo/rolling.json $(if $(TO),--to $(TO))

test: $(TOOLS) ## all tests that this machine can run, and the slowest hundred; a skip says what is missing
	@command -v redis-server >/dev/null || echo "redis-server is not installed: tests marked redis will be skipped"
	@command -v nginx >/dev/null || echo "nginx (Debian: nginx-light) is not installed: the tests of the gateway will be skipped"
	@ldconfig -p 2>/dev/null | grep -q libb64 || echo "libb64 (Debian: libb64-0d) is not installed: the test of `bench` runs without perf_analyzer"
	@$(call pytest,not alone and not long,--numprocesses auto --maxprocesses 4 --durations 100)
	@$(call pytest,alone and not long,--durations 5)

test-long: $(TOOLS) ## the soaks: the same tests for longer
	@$(call pytest,long,--durations 5)

# Code 5 means that no test has the marks: so it is with PYTEST="-k NAME".
pytest = echo "pytest -m '$(1)' $(2) $(PYTEST)"; \
  $(TEST_ENV) $(BIN)/python -m pytest -rs -m '$(1)' $(2) $(PYTEST) || { code=$$?; [ $$code = 5 ] || exit $$code; }

EXAMPLES ?= 200
soak: $(TOOLS) ## features meet in any order, on twins and on a real server, for as long as EXAMPLES=200 last
	@PEREGRINE_SOAK=$(EXAMPLES) $(TEST_ENV) $(BIN)/python -m pytest -x -rs tests/together/test_any_order.py

check: $(TOOLS) ## ruff format, ruff, mypy
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

format: $(TOOLS) ## what `check` can repair by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

PYTHON312 ?= python3.12
lock: $(TOOLS) ## all locks again, from pyproject.toml's extras and the versions in .venv (and of a Python 3.12)
	$(BIN)/python .ci/lock.py requirements.lock
	$(BIN)/python .ci/lock.py --extras serve,redis,s3,compile,traces docker/serve-py311.lock
	$(BIN)/python .ci/lock.py --extras serve,redis,s3,build,encoders docker/build-py311.lock
	@rm -rf $(VENV)/312 && $(PYTHON312) -m venv $(VENV)/312 && $(VENV)/312/bin/pip install --quiet '.[serve,redis,s3,compile,traces]' setuptools && \
	  $(VENV)/312/bin/python .ci/lock.py --extras serve,redis,s3,compile,traces docker/serve-py312.lock || echo "no Python 3.12: docker/serve-py312.lock stays as it is (PYTHON312=…)"

clean: ## remove the demo, caches and build leftovers; .venv and model_repository stay
	rm -rf demo build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
