# `make train` and `make test` are all the set-up there is: each makes .venv, installs what it needs, and runs.
# PYTHON=python3.12   which Python makes .venv (default: the first of 3.10 to 3.13 that is found)
# ARGS="--seed 1"     more flags for the command behind the target
# PIP_ARGS="..."      more flags for pip, such as --extra-index-url https://download.pytorch.org/whl/cpu

PYTHON ?= auto
ARGS ?=
PIP_ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile $(PIP_ARGS) -c constraints.txt
# Installing without bytecode halves the time; the first import then writes that of the modules in use, so it must be let.
export PYTHONDONTWRITEBYTECODE :=
DECLARED := pyproject.toml constraints.txt

help:
	@echo "make train   train a language model without labels on the built-in lab, and show before -> after (minutes)"
	@echo "make test    run the tests"
	@echo "make lint    ruff, mypy and the import rules"
	@echo "make docs    build the documentation into site/"
	@echo "make lab     make the lab's two base models again from their seeds"
	@echo "make clean   remove .venv, site/ and the caches; runs/ stays"
	@echo "Each target makes .venv and installs what it needs by itself. Options: PYTHON=, ARGS=, PIP_ARGS= (see Makefile)."

train: $(VENV)/.installed-run
	$(BIN)/vigor train --config lab --output_dir "runs/lab-$$(date +%Y%m%d-%H%M%S)" $(ARGS)

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet $(ARGS)
	@echo "Documentation: site/index.html"

lab: $(VENV)/.installed-run
	$(BIN)/python -m vigor.lab.build --world lab $(ARGS)
	$(BIN)/python -m vigor.lab.build --world lab-misaligned $(ARGS)

clean:
	rm -rf $(VENV) site build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage .coverage.*

$(VENV)/.created:
	@found=""; \
	if [ "$(PYTHON)" = auto ]; then names="python3 python3.12 python3.13 python3.11 python3.10 python"; else names="$(PYTHON)"; fi; \
	for name in $$names; do \
	  if "$$name" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' >/dev/null 2>&1; then found="$$name"; break; fi; \
	done; \
	if [ -z "$$found" ]; then \
	  echo "vigor needs Python 3.10, 3.11, 3.12 or 3.13; none of these is one: $$names." >&2; \
	  echo "Install one and name it: make train PYTHON=/path/to/python3.12" >&2; exit 1; \
	fi; \
	if ! "$$found" -c 'import venv, ensurepip' >/dev/null 2>&1; then \
	  echo "$$found lacks the module venv or ensurepip; on Debian and Ubuntu: apt install python3-venv" >&2; exit 1; \
	fi; \
	echo "Making $(VENV) with $$("$$found" --version) ..."; \
	"$$found" -m venv $(VENV) && touch $@

$(VENV)/.installed-run: $(VENV)/.created $(DECLARED)
	@echo "Installing vigor, PyTorch, TRL and what they need into $(VENV): one to five minutes, the first time only ..."
	@$(PIP) -e .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.created $(DECLARED)
	@echo "Installing vigor and the tools for its tests into $(VENV): one to five minutes, the first time only ..."
	@$(PIP) -e ".[dev]"
	@touch $(VENV)/.installed-run $@

$(VENV)/.installed-docs: $(VENV)/.created $(DECLARED)
	@echo "Installing vigor and the tools for its documentation into $(VENV): the first time only ..."
	@$(PIP) -e ".[docs]"
	@touch $(VENV)/.installed-run $@

.PHONY: help train test lint docs lab clean
