# Every target makes .venv first; `make help` lists them.
#
#   PYTHON=...             the Python (>= 3.11) to make .venv with; default: the first that serves
#   TORCH_INDEX=...        a further package index, for example one that offers CPU builds of torch
#   GAC_FAST_NO_CPP=1      leave out the C++ engine (needs no compiler)
#   TEST_PROCESSES=...     processes that run the tests (1)
#   TEST_OPTIONS="..."     further options of pytest for `make test`
#   BENCH="..."            options of `make bench`, for example BENCH="-k update --quick --threads 1"
#   BENCH_CSV=...          where it appends its rows; the chart lies beside
#   BENCH_CHECK_CSV=...    where `make bench-check` puts the rows that it checks
#   GPU_PYTHON=...         the Python of `make gpu`, which has torch and triton; default: python3
#   GPU_OUT=...            folder of its records; the next `make gpu` goes on there
#   GPU="..."              its options, for example GPU="--only decode_step"
#   PEERS="..."            arguments of a script of `make peers`, which then runs it, for example
#                          PEERS="hf_dt --data hopper-medium.hdf5"; without it the environment alone is made
#   RESOURCES=...          CSV of what the kernels need, made by `make resources`
#   GAC_FAST_DATA=...      folder of full D4RL files; tests that want them skip without it

VENV := .venv
PEERS_VENV := .venv-peers
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
PYTHON ?=
TORCH_INDEX ?=
CXX_CANDIDATES := $(or $(if $(filter-out default undefined,$(origin CXX)),$(firstword $(CXX))),c++ g++ clang++)

BENCH ?=
# Processes of the tests, each of which takes whole files. Tests of the benchmarks run on all cores: beside another
# process, threads of OpenMP that wait for each other take minutes where they take seconds alone.
TEST_PROCESSES ?= 1
PARALLEL := $(if $(filter-out 0 1,$(TEST_PROCESSES)),-n $(TEST_PROCESSES) --dist loadfile)
TEST_OPTIONS ?=
BENCH_CSV ?= benchmarks/results/speed.csv
BENCH_CHECK_CSV ?= runs/bench-check.csv
GPU_PYTHON ?= python3
GPU_OUT ?= runs/gpu
GPU ?=
PEERS ?=
RESOURCES ?= runs/kernels.csv

NO_CPP := $(filter-out 0,$(GAC_FAST_NO_CPP))
DEPENDENCIES := $(VENV)/.dependencies
# One name per kind of build, so that switching kinds installs again.
INSTALLED := $(VENV)/.installed$(if $(NO_CPP),-no-cpp)
OTHER_INSTALLED := $(VENV)/.installed$(if $(NO_CPP),,-no-cpp)
# The engine lies in the source tree; where it was removed, install again.
ENGINE_MISSING := $(if $(NO_CPP)$(wildcard gac_fast/_C.*.so),,FORCE)
SOURCES := setup.py pyproject.toml CMakeLists.txt gac_fast/_version.py $(wildcard csrc/*)

export PIP_REQUIRE_VIRTUALENV := 1

.DEFAULT_GOAL := help
.PHONY: help demo finetune-demo test test-kernels test-all sanitize sanitize-short lint format bench bench-check gpu peers resources clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 24

demo: $(INSTALLED) ## train GAC on PointMaze, plan, act, and write runs/demo (about 10 minutes)
	$(PY) -m gac_fast.demo

runs/demo/result.json:
	$(MAKE) demo

finetune-demo: $(INSTALLED) | runs/demo/result.json ## let the demo's model improve by acting, and write runs/demo-online (about 20 minutes)
	$(PY) -m gac_fast.finetune_demo

# Ends in the summary line of pytest: lint comes first.
test: lint ## lint, type-check and run the tests that are not slow
	$(PY) -m pytest -m "not slow" $(PARALLEL) $(TEST_OPTIONS)

test-kernels: $(INSTALLED) ## those of them that are of the Triton kernels, interpreted and compiled
	$(PY) -m pytest -m "not slow" tests/test_*_triton.py

test-all: lint resources ## the same with the slow tests, after the table of what the kernels need
	$(PY) -m pytest $(PARALLEL)

sanitize: $(INSTALLED) ## tests of the ops under AddressSanitizer and UBSan, the thread pool under ThreadSanitizer
	PY=$(PY) tests/sanitize.sh

sanitize-short: $(INSTALLED) ## a choice of them for the narrowest and the widest path, in about 3 minutes
	PY=$(PY) tests/sanitize.sh --short

lint: $(INSTALLED) ## ruff, clang-format and mypy
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/clang-format --dry-run -Werror csrc/*
	$(PY) -m mypy

format: $(INSTALLED) ## format the Python and C++ files
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	$(VENV)/bin/clang-format -i csrc/*

bench: $(INSTALLED) ## every op against the reference: table of ratios, CSV and chart (9 minutes, on a quiet machine)
	$(PY) -m pytest benchmarks --benchmark-quiet --csv $(BENCH_CSV) $(BENCH)
	$(PY) benchmarks/report.py $(BENCH_CSV) --plot $(BENCH_CSV:.csv=.png)

# Begins anew each time: what an earlier run reached says nothing of the code as it is.
bench-check: $(INSTALLED) ## whether every ratio of benchmarks/thresholds.toml holds on this machine (3 minutes)
	rm -f $(BENCH_CHECK_CSV)
	$(PY) -m pytest benchmarks --benchmark-quiet --quick --guarded --threads 1 --csv $(BENCH_CHECK_CSV)
	$(PY) benchmarks/check.py $(BENCH_CHECK_CSV)

# Takes a Python as it is and fetches nothing: GPU machines often reach no index.
gpu: ## on a CUDA machine: kernel tests, repeats, sanitizer, speed against PyTorch; below 8 minutes, resumable
	@$(GPU_PYTHON) -c 'import gac_fast.kernels' 2>/dev/null || \
	  PIP_REQUIRE_VIRTUALENV=0 GAC_FAST_NO_CPP=1 $(GPU_PYTHON) -m pip install --no-deps --no-build-isolation -e .
	$(GPU_PYTHON) -m benchmarks.gpu --out $(GPU_OUT) $(GPU)

peers: $(PEERS_VENV)/.dependencies ## an environment with transformers and d3rlpy, and PEERS="..." in it (docs/baselines.md)
	$(if $(PEERS),$(PEERS_VENV)/bin/python -m benchmarks.peers.$(PEERS))

resources: $(INSTALLED) ## registers, spills and shared memory of every kernel, compiled for sm_80 and sm_90
	@mkdir -p $(dir $(RESOURCES))
	$(PY) -m benchmarks.resources --out $(RESOURCES) --markdown $(RESOURCES:.csv=.md) --jobs $$(nproc)

clean: ## remove builds, caches and .venv; runs/ stays
	rm -rf $(VENV) $(PEERS_VENV) build dist *.egg-info gac_fast/_C*.so .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

FORCE:

# Before the downloads: a missing compiler should not show only after them.
CHECK_COMPILER = $(if $(NO_CPP),,@for cxx in $(CXX_CANDIDATES); do command -v "$$cxx" >/dev/null 2>&1 && exit 0; done; \
	echo "error: gac_fast needs a C++17 compiler and found no $(CXX_CANDIDATES): install one, name it by CXX, or set GAC_FAST_NO_CPP=1 to do without the C++ engine." >&2; \
	exit 1)

# An environment that is there already is taken as it is.
$(PY) $(PEERS_VENV)/bin/python:
	@found=; for python in $(if $(PYTHON),"$(PYTHON)",python3.12 python3.11 python3.13 python3 python); do \
	  if "$$python" -c 'import sys, ensurepip, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
	    found="$$python"; break; fi; done; \
	if [ -z "$$found" ]; then \
	  echo "error: gac_fast needs Python >= 3.11 with its venv module and found none$(if $(PYTHON), in PYTHON=$(PYTHON)): install one, or name it as in 'make test PYTHON=/path/to/python3.12'." >&2; \
	  exit 1; fi; \
	echo "making $(@:/bin/python=) with $$found"; \
	"$$found" -m venv $(@:/bin/python=) || { rm -rf $(@:/bin/python=); exit 1; }

$(DEPENDENCIES): constraints.txt | $(PY)
	$(CHECK_COMPILER)
	$(PIP) install $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r constraints.txt
	@touch $@

$(PEERS_VENV)/.dependencies: benchmarks/peers/requirements.txt | $(PEERS_VENV)/bin/python
	$(PEERS_VENV)/bin/python -m pip --disable-pip-version-check install \
	  $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) -r benchmarks/peers/requirements.txt
	@touch $@

$(INSTALLED): $(SOURCES) $(DEPENDENCIES) $(ENGINE_MISSING)
	$(CHECK_COMPILER)
	$(if $(NO_CPP),rm -f gac_fast/_C*.so)
	$(PIP) install --no-deps --no-build-isolation -e .
	@rm -f $(OTHER_INSTALLED)
	@touch $@
