# One folder, one environment: every target makes what it needs and can be run first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help install demo test test-slurm check fast format docs ui clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1\t\2/' | expand -t 20

install: $(READY)  ## the environment in .venv, with everything that tests need
$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is " + sys.version) if sys.version_info < (3, 11) else None'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -e '.[dev]'
	@touch $(READY)

demo: $(READY)  ## six runs, trained, evaluated and tracked, in some minutes on two cores
	$(BIN)/python run.py -m model=tiny,small relora.r=8,16,32

test: $(READY)  ## the whole suite
	$(BIN)/python -m pytest -n 3 --dist loadscope

test-slurm: $(READY)  ## real jobs on a private SLURM cluster; installs its packages where it may
	RELORA_SLURM=require $(BIN)/python -m pytest tests/slurm

fast: $(READY)  ## the tests that take no more than seconds
	$(BIN)/python -m pytest -n 2 --dist loadscope -m 'not slow and not slurm and not browser and not gpu'

check: $(READY)  ## format, lint, types, import rules, fast tests
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright
	$(BIN)/lint-imports
	$(MAKE) fast

format: $(READY)  ## put the code into its one format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

docs: $(READY)  ## the documentation as a site, in build/site
	$(BIN)/python -m sphinx -W --keep-going -q -b html -d build/doctrees docs build/site
	@echo build/site/index.html

ui: $(READY)  ## MLflow's pages over outputs/mlflow.db on loopback, and links into them
	$(BIN)/python -m sweeps ui $(if $(PORT),--port $(PORT))

clean:  ## remove the environment and caches; outputs/ stays
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis *.egg-info
