# What a newcomer runs; `make` lists it. Everything runs in .venv, which is made once and again only when
# pyproject.toml or constraints.txt change.
.DEFAULT_GOAL := help
.PHONY: help quickstart test acceptance lint clean

export PIP_DISABLE_PIP_VERSION_CHECK := 1
SHELL := bash
BIN := .venv/bin
# The constraints were tested on 3.11, so it comes first. Some systems have a python3.11 that cannot make environments.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3; do \
	$$python -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && \
	echo $$python && break; done)

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

quickstart: .venv/ready ## generate a small world, train, evaluate, serve and ask: 7 to 15 minutes on 2 cores
	@$(BIN)/python -m jobs.quickstart

test: lint ## all checks and the fast tests
	@$(BIN)/pytest

acceptance: .venv/ready ## the slow tests: killed workers, job submission
	@$(BIN)/pytest -m acceptance

lint: .venv/ready ## style, types and import rules
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-logo

clean: ## remove the environment and the tools' caches; artifacts stay
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info

.venv/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "no Python ≥ 3.11 with venv here; install one, or name it: make PYTHON=…" >&2; exit 1; }
	@echo "making .venv with $(PYTHON): about 2 minutes and 2 GB"
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install -qq -c constraints.txt -e '.[cpu,dev]'
	@touch $@
