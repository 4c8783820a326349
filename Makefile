# Everything happens in .venv. Stamps under .venv/stamps say what is installed there, so a second call is fast: a change
# of pyproject.toml installs dependencies anew, a change of a source file only the package.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= python3
PIP := .venv/bin/python -m pip install --quiet
# Folders too, so that a deleted file is noticed.
PACKAGE := setup.py README.md LICENSE $(shell find agents autoprune search_spaces -not -path '*/__pycache__*')
DEMO := runs/demo

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: demo
demo: .venv/stamps/package ## train a small network on the embedded digits, search, prune it: under 3 minutes
	.venv/bin/autoprune search --model resnet8 --data digits --budget "macs<=15%" --candidates 40 \
		--finetune-steps 15 --seed 0 --out $(DEMO)

# Tests use one thread each, so several processes share the cores; a file's tests stay together, as do its fixtures.
PYTEST := .venv/bin/pytest --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: test
test: install-test ## the test suite, on the installed package; ARGS="..." goes to pytest
	$(PYTEST) $(ARGS)

.PHONY: torture
torture: install-test ## the minutes-long tests that `make test` leaves out
	.venv/bin/pytest -m torture $(ARGS)

.PHONY: gpu
gpu: install-test ## the tests that need a CUDA device, which `make test` skips where there is none
	.venv/bin/pytest -m gpu $(ARGS)

.PHONY: check
check: lint test ## lint, then test

.PHONY: lint
lint: .venv/stamps/package .venv/stamps/check ## formatter, ruff, and mypy --strict on a regular install
	.venv/bin/ruff format --check
	.venv/bin/ruff check
	.venv/bin/python tools/typecheck.py

.PHONY: install
install: .venv/stamps/package ## .venv with the package in it

.PHONY: install-test
install-test: .venv/stamps/package .venv/stamps/test ## the same, and what the tests need

.PHONY: clean
clean: ## remove what was built and cached; .venv and runs/ stay
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find agents autoprune benchmarks examples search_spaces tests tools -name __pycache__ -prune -exec rm -rf {} +

.venv/stamps/python:
	@command -v "$(PYTHON)" >/dev/null || { echo "no '$(PYTHON)' here; name one that is: make PYTHON=/path/to/python3.11"; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "autoprune needs Python 3.11 or newer, but $(PYTHON) is $$("$(PYTHON)" --version 2>&1);" \
		"name another: make PYTHON=python3.12"; exit 1; }
	"$(PYTHON)" -m venv .venv
	@mkdir -p $(@D) && touch $@

.venv/stamps/dependencies: pyproject.toml | .venv/stamps/python
	@echo "installing autoprune with what it needs; torch is large, so the first time takes minutes"
	rm -rf build *.egg-info
	$(PIP) .
	@touch $@

# What pip builds in build/ is removed first: a module deleted since would be installed again from there.
.venv/stamps/package: $(PACKAGE) .venv/stamps/dependencies
	rm -rf build *.egg-info
	$(PIP) --no-deps --no-build-isolation --force-reinstall .
	@touch $@

.venv/stamps/test .venv/stamps/check: pyproject.toml .venv/stamps/dependencies
	$(PIP) ".[$(@F)]"
	@touch $@
