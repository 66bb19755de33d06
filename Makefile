# omni: a machine needs python3 (3.10 or newer), make and a network; the rest is installed here, under .venv/.
# Try `make help`.

SHELL := /bin/sh
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.omni-ready
# What the tests draw, and the threads of each of their two processes: `make test OMNI_TEST_SEED=3 OMNI_TEST_THREADS=2`.
export OMNI_TEST_SEED ?= 0
export OMNI_TEST_THREADS ?= 1
TESTS = HF_HUB_OFFLINE=1 OMP_NUM_THREADS=$(OMNI_TEST_THREADS) $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder
UV = $$(command -v uv || echo .venv-uv/bin/uv)

# The training of omni-nano is many small operations: more threads than this only wait for each other.
nano nano-smoke: export OMP_NUM_THREADS ?= 2
# Without compiled bytecode every process that the tests start would compile its imports anew.
unexport PYTHONDONTWRITEBYTECODE
# Wheels of several hundred megabytes on a slow line take longer than uv's usual 30 seconds.
export UV_HTTP_TIMEOUT ?= 300
# A machine whose pip is pointed at a mirror by a variable wants the same mirror here.
ifdef PIP_INDEX_URL
export UV_DEFAULT_INDEX ?= $(PIP_INDEX_URL)
endif

.PHONY: help setup demo nano nano-smoke test test-slow lint clean

help:  ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' Makefile

setup: $(READY)  ## install omni and all it needs into .venv/ (again when pyproject.toml changes)

demo: $(READY)  ## three questions to the bundled model omni-nano; writes out.wav and out.png
	@HF_HUB_OFFLINE=1 $(BIN)/python -m omni.cli demo

nano: $(READY)  ## train omni-nano from nothing, hours (WORK=folder; the same command goes on where it was)
	@command -v flite >/dev/null && command -v espeak-ng >/dev/null || { \
	  echo "the data of omni-nano is spoken by flite and espeak-ng; on Debian: apt-get install flite espeak-ng" >&2; exit 1; }
	@$(BIN)/python -c 'import pocketsphinx' 2>/dev/null || $(UV) pip install --quiet --python $(BIN)/python pocketsphinx
	@$(BIN)/python recipes/nano/run.py --work $(or $(WORK),runs/nano)

nano-smoke: $(READY)  ## a minute of it: every stage for a few steps, on bundled clips
	@$(BIN)/python recipes/nano/run.py --smoke --work $(or $(WORK),runs/nano_smoke)

# Both halves always run, so that a formatting slip does not hide a failing test; either makes the target fail.
test: $(READY)  ## ruff, mypy and the tests but the slow ones, offline (OMNI_TEST_SEED=3: other draws)
	@status=0; $(MAKE) lint || status=$$?; \
	$(TESTS) -m "not slow" || status=$$?; exit $$status

test-slow: $(READY)  ## the same with the slow tests too
	@status=0; $(MAKE) lint || status=$$?; \
	$(TESTS) || status=$$?; exit $$status

lint: $(READY)  ## only ruff (rules and format) and mypy
	@status=0; \
	$(BIN)/python -m ruff check . || status=$$?; \
	$(BIN)/python -m ruff format --check . || status=$$?; \
	$(BIN)/python -m mypy || status=$$?; exit $$status

clean:  ## remove .venv/, caches and the demo's output
	rm -rf .venv .venv-uv *.egg-info build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis out.wav out.png answer_?.wav
	find omni tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +

# uv, not pip, chooses the wheels: it takes torch, torchaudio and torchvision builds that load beside each other.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null || { \
	  echo "omni needs Python 3.10 or newer, but '$(PYTHON)' is: $$($(PYTHON) --version 2>&1)." >&2; \
	  echo "Install a newer one and name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
	@echo "Setting up .venv (the first time downloads PyTorch; later runs skip this step)"
	@set -e; uv=$$(command -v uv) || { uv=.venv-uv/bin/uv; test -x $$uv || { \
	    $(PYTHON) -m venv .venv-uv && .venv-uv/bin/python -m pip install --quiet uv; } || { \
	    echo "The installer could not be set up: check the network, and that '$(PYTHON) -m venv' works" >&2; \
	    echo "(on Debian and Ubuntu it is the package python3-venv)." >&2; rm -rf .venv-uv; exit 1; }; }; \
	$(BIN)/python -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null \
	  || $$uv venv --quiet --clear --python "$$($(PYTHON) -c 'import sys; print(sys.executable)')" .venv; \
	$$uv pip install --python $(BIN)/python --constraint constraints.txt --editable '.[dev]'
	@touch $@
