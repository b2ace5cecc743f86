# Needs make and Python 3.11 or newer; everything else is installed into .venv.

PYTHON ?= python3
# Options for pip, for example PyTorch's wheels without CUDA:
#   make lab PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"
PIP_FLAGS ?=
# Options of sft-edu lab, for example: make lab LAB_FLAGS="--no-browser --port 8899"
LAB_FLAGS ?=

VENV := .venv
BIN := $(VENV)/bin
START := notebooks/00_start_here.ipynb

.DEFAULT_GOAL := help
.PHONY: help lab test lint format notebooks bench clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

lab: $(VENV)/lab.stamp ## open the lessons in JupyterLab
	@$(BIN)/python -m sft_edu lab --in-place $(LAB_FLAGS)

test: $(VENV)/test.stamp ## run every test: library, lessons, browser
	@$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile --no-loadscope-reorder

lint: $(VENV)/test.stamp ## check style, common mistakes and types
	@$(BIN)/python -m ruff check
	@$(BIN)/python -m ruff format --check
	@$(BIN)/python -m mypy

format: $(VENV)/test.stamp ## format the code and mend what ruff can mend
	@$(BIN)/python -m ruff check --fix
	@$(BIN)/python -m ruff format

# Lesson 0 counts the questions of the others, so it comes last.
notebooks: $(VENV)/test.stamp ## run every lesson and write docs/api.md again
	@$(BIN)/python tools/run_notebooks.py $(filter-out $(START),$(wildcard notebooks/*.ipynb notebooks/*/*.ipynb)) $(START)
	@$(BIN)/python tools/api_page.py

bench: $(VENV)/test.stamp ## run every benchmark
	@for script in $(wildcard benchmarks/*.py); do echo "== $$script"; $(BIN)/python "$$script" || exit 1; done

clean: ## remove the environment and all that tools leave behind
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name .ipynb_checkpoints -prune -exec rm -rf {} +

# A stamp is the moment of the last installation. [test] contains [lab], so the test stamp renews both.
INSTALL = @tools/install.sh "$(PYTHON)" $(VENV)
INPUTS := pyproject.toml constraints.txt tools/install.sh

$(VENV)/lab.stamp: $(INPUTS) $(BIN)/python
	$(INSTALL) lab $(PIP_FLAGS)
	@touch $@

$(VENV)/test.stamp: $(INPUTS) $(BIN)/python
	$(INSTALL) test $(PIP_FLAGS)
	@touch $(VENV)/lab.stamp $@

# No recipe: where the interpreter is missing (no .venv yet, or its Python was removed) both stamps are stale.
$(BIN)/python: ;
