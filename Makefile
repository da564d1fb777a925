# The Python that makes .venv, and the demo server's port: make demo PYTHON=python3.12 PORT=8001
PYTHON ?= python3
PORT ?= 8000
# OpenMP's waiting threads spin by default, which costs several times the work's time when anything else runs.
export OMP_WAIT_POLICY ?= PASSIVE
RUN := .venv/bin/python -m

.DEFAULT_GOAL := help
.PHONY: help setup demo test format clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: ## make .venv with what this machine can use
	@$(PYTHON) scripts/bootstrap.py

demo: setup ## prune a small language model, serve it and ask it a question
	@$(RUN) scripts.demo --port $(PORT)

test: setup ## lint, check types, run all tests
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) pytest

format: setup ## format the code
	$(RUN) ruff check --fix
	$(RUN) ruff format

clean: ## remove .venv and .demo
	rm -rf .venv .demo
