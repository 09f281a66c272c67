# `make` lists the targets. Each does all the set-up it needs: a virtual environment in
# .venv with every version as in requirements.lock.

PYTHON ?= python3
BIN := .venv/bin
# A changed lock or pyproject.toml changes the stamp's name, so set-up is done again
STAMP := .venv/.installed-$(shell cat requirements.lock pyproject.toml | cksum | cut -d' ' -f1)

.DEFAULT_GOAL := help
.PHONY: help book test learning kills lab lint lock cluster clean gpu-check gpu-smol

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

book: $(STAMP) ## Execute the notebooks and build the HTML book (profile tiny)
	$(BIN)/rlreason book --profile tiny

# A file's tests share a process, a few long ones are shared out: see conftest.py
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --maxprocesses 8 \
  --dist loadscope --no-loadscope-reorder

test: $(STAMP) ## Run the tests
	$(PYTEST)

learning: $(STAMP) ## Run the tests that train with the plainest arithmetic of PyTorch
	ATEN_CPU_CAPABILITY=default $(PYTEST) -m learning

kills: $(STAMP) ## Kill short runs 200 times, and at each write: minutes
	$(BIN)/python tests/kills.py --kills 200 --writes

lab: $(STAMP) ## Open the notebooks in JupyterLab
	$(BIN)/jupyter lab --notebook-dir notebooks

lint: $(STAMP) ## Check style and layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

# A machine with a GPU may have no network: these take the environment that is there.
# scripts/gpu-wheels.txt says what it needs.
THERE = $(or $(wildcard $(BIN)/python),$(PYTHON))

gpu-check: ## Measure a GPU: make gpu-check [MODEL=folder] [SIZE=0.01]
	$(THERE) -m rlreason.cli bench gpu $(if $(MODEL),--model $(MODEL)) --size $(or $(SIZE),1)

gpu-smol: ## Record smol on a GPU: make gpu-smol MODEL=folder MINUTES=n
	PYTHON=$(THERE) sh scripts/gpu_smol.sh $(MODEL) $(MINUTES) $(PROFILE)

lock: $(STAMP) ## Make requirements.lock from pyproject.toml, with today's versions
	$(BIN)/python -m pip install -q uv
	{ sed -n '/^#/p' requirements.lock; $(BIN)/uv pip compile pyproject.toml --extra dev \
	  --universal --python-version 3.10 --upgrade --no-header --no-annotate -q; \
	} > requirements.lock.new
	mv requirements.lock.new requirements.lock

cluster: $(STAMP) ## Install Ray, for --executor ray: 80 MB
	@$(BIN)/python -m pip install -qq -c requirements.lock --no-build-isolation -e '.[cluster]'

clean: ## Remove the built book, its runs and caches; other runs and .venv stay
	rm -rf book/_build runs/book .pytest_cache .ruff_cache .import_linter_cache

# .unfinished marks a set-up that was interrupted: what it left cannot be trusted
$(STAMP):
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' \
	  || { echo "Python 3.10 to 3.13 is needed; say which: make PYTHON=python3.11"; exit 1; }
	@echo "Setting up .venv: a few minutes, once"
	@if [ -e .venv/.unfinished ]; then rm -rf .venv; fi
	@$(PYTHON) -m venv .venv && touch .venv/.unfinished
	@$(BIN)/python -m pip install -qq -r requirements.lock
	@$(BIN)/python -m pip install -qq --no-deps --no-build-isolation -e .
	@rm -f .venv/.installed-* .venv/.unfinished && touch $@
