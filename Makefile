# make demo [DATA=<PTB-XL root>]   everything from nothing, then the main job end to end
# make test                        everything from nothing, then the whole CPU test suite
# make setup | lint | bench        installing alone | formatting, lint and types | the CPU benchmarks
# make slurm-lab                   a real Slurm of four nodes on this machine, to play with

PYTHON ?= python3
DEMO ?= demo
LABELS ?= NORM
RECORDS ?= 500
JOBS ?= $(shell getconf _NPROCESSORS_ONLN)
# Further flags for the demo's steps, for example TRAIN_FLAGS="--train.samples 100000".
TRAIN_FLAGS ?=
SAMPLE_FLAGS ?= --sampler dpmpp --eta 1
EVALUATE_FLAGS ?=

BIN := .venv/bin
PIP := $(BIN)/python -m pip install -qq --disable-pip-version-check --no-build-isolation -c constraints.txt
RUN := $(BIN)/sssd-hpc
SOURCE := $(or $(DATA),$(DEMO)/simulated)

.PHONY: setup demo test lint bench slurm-packages slurm-lab browser-package
.DELETE_ON_ERROR:

setup: .venv/installed

# A machine without a GPU takes a CPU wheel of torch where pip can find one.
.venv/installed: pyproject.toml setup.py constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v <= (3, 13) \
	  else "error: python3 is %d.%d; 3.10 to 3.13 is needed, name one with PYTHON=" % v)'
	@command -v g++ >/dev/null || { echo "error: g++ not found; install a C++ compiler" >&2; exit 2; }
	@echo "setup: 1/3 torch"
	@$(PYTHON) -m venv .venv
	@$(BIN)/python -m pip install -qq --disable-pip-version-check -c constraints.txt \
	  "setuptools>=77" wheel ninja
	@if command -v nvidia-smi >/dev/null; then $(PIP) torch numpy; \
	  else $(PIP) torch==2.13.0+cpu numpy 2>/dev/null || $(PIP) torch numpy; fi
	@echo "setup: 2/3 the package and what it needs"
	@DS_BUILD_OPS=0 $(PIP) -e ".[dev]"
	@echo "setup: 3/3 DeepSpeed's CPU communication (compiled once)"
	@$(BIN)/python -m sssd_hpc.train.engine
	@touch $@

demo: setup
ifndef DATA
	$(RUN) simulate --out "$(SOURCE)" --records $(RECORDS) --seed 0
endif
	$(RUN) prepare --source "$(SOURCE)" --out "$(DEMO)/store" --labels $(LABELS)
	$(RUN) train --preset tiny --data "$(DEMO)/store" --run "$(DEMO)/run" $(TRAIN_FLAGS)
	$(RUN) sample --run "$(DEMO)/run" --like "$(DEMO)/store" --out "$(DEMO)/synthetic" $(SAMPLE_FLAGS)
	$(RUN) evaluate --real "$(DEMO)/store" --synthetic "$(DEMO)/synthetic" --out "$(DEMO)/report" $(EVALUATE_FLAGS)

# A file stays on one process, so that what its tests share is made once. The Slurm tests share one
# cluster and start many ranks: they run by themselves, one at a time.
test: setup slurm-packages browser-package
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile --ignore tests/slurm
	$(BIN)/python -m pytest tests/slurm

slurm-packages: setup
	@$(BIN)/python -m tests.slurm_lab install

# Chromium, for the tests of the questionnaire's page.
browser-package: setup
	@$(BIN)/python -m tests.review.browser

slurm-lab: setup slurm-packages
	@$(BIN)/python -m tests.slurm_lab start

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m bench.prepare
	$(BIN)/python -m bench
	$(BIN)/python -m bench.report
	$(BIN)/python -m bench.scaling
	$(BIN)/python -m bench.convergence
