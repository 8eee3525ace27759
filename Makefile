# make book    the whole book: environment, notebooks, gate, pages
# make test    everything a change must pass
# make help    all targets
PROFILE ?= demo
PARAMS ?=
JOBS ?=
PYTHON ?=

VENV := .venv
PY := $(VENV)/bin/python
RUN := $(PY) -m scfm_circuits
OPTIONS = --profile "$$PROFILE" --params="$$PARAMS"
AT_ONCE = $(if $(JOBS),--jobs "$(JOBS)")
READY := $(VENV)/.ready
READY_DEV := $(VENV)/.ready-dev
READY_LAB := $(VENV)/.ready-lab
PAGES := tests/book/test_built_pages.py
PIP := $(PY) -m pip --disable-pip-version-check install --quiet

# As they were typed, a dollar too, and through the environment, where a shell takes no character of
# them for its own.
override PROFILE := $(value PROFILE)
override PARAMS := $(value PARAMS)
override H5AD := $(value H5AD)
override OUT := $(value OUT)
export PROFILE PARAMS

# Threads that wait asleep, not spinning: the same speed on idle cores, and several times faster
# where something else runs too. Freed memory is kept for the next batch instead of being given back
# and fetched again (glibc). Both change no result.
export OMP_WAIT_POLICY ?= PASSIVE
export MALLOC_TRIM_THRESHOLD_ ?= 4000000000
export MALLOC_MMAP_THRESHOLD_ ?= 4000000000

# The first Python that is new enough; the one named in PYTHON is taken alone.
FIND_PYTHON = for candidate in $(or $(PYTHON),python3 python3.12 python3.13 python3.11 python); do \
    if "$$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; then \
      found="$$candidate"; break; fi; done; \
  if [ -z "$$found" ]; then \
    echo "Python 3.11 or newer is needed and was not found; install it or give PYTHON=path." >&2; \
    exit 1; fi

# A name that is misspelled would be passed over, and another book made than the one meant.
NAMES := PROFILE PARAMS JOBS PYTHON BENCH H5AD OUT EXTENDS OVERWRITE VENV READY RUN SHELL SCFM_%
GIVEN := $(foreach name,$(.VARIABLES),$(if $(filter command,$(firstword $(origin $(name)))),$(name)))
UNKNOWN := $(firstword $(filter-out $(NAMES),$(GIVEN)))
ifneq ($(UNKNOWN),)
  $(error make takes no $(UNKNOWN)=; a field of the profile goes into PARAMS="field=value", a \
    variable of the environment before `make`, and names are in capitals (PROFILE, PARAMS, JOBS))
endif

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: book notebooks plan data check profile test lint types unit smoke bench gpu-check lab clean \
  help

book: $(READY) ## Execute what is stale, check it, build the pages [PROFILE=demo PARAMS="seed=1" JOBS=2]
	@$(RUN) book $(OPTIONS) $(AT_ONCE)

notebooks: $(READY) ## Execute the stale notebooks of PROFILE only
	@$(RUN) book execute $(OPTIONS) $(AT_ONCE)

plan: $(READY) ## What PROFILE would cost here: downloads, disk, memory, time; runs nothing
	@$(RUN) plan $(OPTIONS) $(AT_ONCE)

data: $(READY) ## Fetch and verify the cells, model and gene sets of PROFILE, nothing else
	@$(RUN) data $(OPTIONS)

check: $(READY) ## The gate: are all executed chapters of PROFILE whole and fresh?
	@$(RUN) book check $(OPTIONS)

profile: export H5AD := $(H5AD)
profile: export OUT := $(OUT)
profile: export EXTENDS := $(EXTENDS)
profile: export OVERWRITE := $(OVERWRITE)
profile: $(READY) ## A first profile for your cells [H5AD=cells.h5ad OUT=mine.yml EXTENDS=geneformer OVERWRITE=1]
	@$(RUN) profile

test: lint types unit smoke ## Lint, types, unit tests, and the whole book on PROFILE=smoke
	@echo "All tests passed."

lint: $(READY_DEV) ## ruff over all Python, and the contracts: which room may import what
	@echo "Lint"
	@$(PY) -m ruff check --quiet src tests notebooks book/_ext
	@$(PY) tests/contracts.py

types: $(READY_DEV) ## mypy over the package
	@echo "Types"
	@$(PY) -m mypy src

# A file of tests stays in one process, which makes what they share once. The pages are seen in
# `make smoke`.
unit: $(READY_DEV) ## Unit tests; they run on the processor, and those of a GPU where there is one
	@echo "Unit tests"
	@$(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder --ignore=$(PAGES) tests
	@if nvidia-smi -L >/dev/null 2>&1; then $(PY) -m pytest -m gpu tests; fi

smoke: $(READY_DEV) ## The whole book on PROFILE=smoke, into book/_build/smoke, seen in a browser
	@echo "The book on PROFILE=smoke"
	@$(RUN) book --profile smoke --output book/_build/smoke
	@SCFM_BUILT_BOOK=book/_build/smoke/html $(PY) -m pytest -n 2 $(PAGES)

bench: $(READY_DEV) ## Benchmarks; figures go to results/bench/*.json [BENCH=enrichment]
	@ls tests/benchmarks/bench_$(or $(BENCH),*).py >/dev/null 2>&1 || \
	  { echo "There is no benchmark tests/benchmarks/bench_$(or $(BENCH),*).py." >&2; exit 1; }
	@for script in tests/benchmarks/bench_$(or $(BENCH),*).py; do \
	  echo "$$script"; $(PY) "$$script" || exit 1; done

gpu-check: $(READY_DEV) ## All that a GPU is to show, in minutes, into results/bench/gpu_check.json
	@$(PY) tests/benchmarks/gpu_check.py

lab: $(READY_LAB) ## JupyterLab, in which the .py notebooks open as notebooks
	@$(PY) -m jupyterlab --ServerApp.root_dir=.

# With any Python, as .venv may be missing or broken.
clean: ## Remove the built book, caches, and the results of PROFILE (demo unless given)
	@$(FIND_PYTHON); PYTHONPATH=src "$$found" -B -m scfm_circuits.book.clean "$$PROFILE"

help: ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

# --- the environment ----------------------------------------------------------------------------

$(PY):
	@$(FIND_PYTHON); \
	if ! "$$found" -c 'import ensurepip, venv' >/dev/null 2>&1; then \
	  echo "$$found lacks the module venv; install it (Debian, Ubuntu: python3-venv)." >&2; exit 1; fi; \
	echo "Making $(VENV) with $$("$$found" --version)"; "$$found" -m venv $(VENV)

# Each stamp is written last, so an interrupted installation is taken up again.
$(READY): requirements.lock pyproject.toml | $(PY)
	@echo "Installing the packages of requirements.lock (minutes, the first time)"
	@$(PIP) -r requirements.lock
	@$(PIP) --no-deps -e .
	@touch $@

$(READY_DEV): requirements-dev.lock $(READY)
	@echo "Installing the test tools of requirements-dev.lock"
	@$(PIP) -r requirements-dev.lock
	@touch $@

$(READY_LAB): pyproject.toml $(READY)
	@echo "Installing JupyterLab"
	@$(PIP) -c requirements.lock -e ".[lab]"
	@$(VENV)/bin/jupytext-config --settings-file \
	  $(VENV)/etc/jupyter/labconfig/default_setting_overrides.json set-default-viewer python >/dev/null
	@touch $@
