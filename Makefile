# The Python that makes .venv, the demo server's port, all methods in the demo: make demo PYTHON=python3.12 PORT=8001 ALL=1
# Releases and all tests: make compat VERSIONS="0.26.0 0.32.0" ALL=1
PYTHON ?= python3
PORT ?= 8000
ALL ?=
RUN := .venv/bin/python -m
# Images of containers set it. Then every process compiles all it imports anew, vLLM's front end for half a minute.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help setup demo test compat zoo format clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /make \1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup: ## make .venv with what this machine can use
	@$(PYTHON) scripts/bootstrap.py

demo: setup ## prune a small language model, serve it and ask it a question
	@$(RUN) scripts.demo --port $(PORT) $(if $(filter-out 0,$(ALL)),--all)

test: setup ## lint, check types, run all tests
	$(RUN) ruff check
	$(RUN) ruff format --check
	$(RUN) mypy
	$(RUN) pytest -n auto --dist loadfile --no-loadscope-reorder

compat: setup ## run tests of the plugin with each release of vLLM that it is for, in environments of their own
	$(RUN) benchmarks.compat $(if $(VERSIONS),--versions $(VERSIONS)) $(if $(filter-out 0,$(ALL)),--exhaustive)

zoo: setup ## prune every architecture that transformers knows, tiny, and serve some
	$(RUN) benchmarks.zoo
	$(RUN) benchmarks.served

format: setup ## format the code
	$(RUN) ruff check --fix
	$(RUN) ruff format

clean: ## remove .venv, .compat and .demo
	rm -rf .venv .compat .demo
