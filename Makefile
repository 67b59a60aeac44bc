# Each target sets up what it needs the first time; a second run starts at once.
# The first that runs and is one of those with which the bundled Triton server works. (A name on PATH
# may be a launcher without its Python.) `make test-nightly` tests both.
PYTHON ?= $(shell for one in python3.11 python3.12 python3; do \
	$$one -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' 2>/dev/null && { echo $$one; break; }; done)
VENV := .venv
BIN := $(VENV)/bin
# Pip's own bar is the progress; PIP_ARGS lets a mirror or a cache be named.
# What is never imported is not compiled.
PIP := $(BIN)/python -m pip install --no-compile --disable-pip-version-check $(PIP_ARGS)

# Tests start hundreds of processes; without kept bytecode each would compile all modules anew.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test cov test-slow test-nightly check fix docs bench wheel test-wheel lock locked gpu clean

help: ## Show the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/.base:
	@command -v "$(PYTHON)" >/dev/null || { echo "error: no Python of version 3.11 or 3.12 found (looked for: $(or $(PYTHON),python3.11 python3.12 python3)): install one, or name one with make PYTHON=..." >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.demo: $(VENV)/.base pyproject.toml
	@echo "installing what the demo needs (about 600 MB, once)"
	$(PIP) -e '.[export,serve]'
	@touch $@

$(VENV)/.dev: $(VENV)/.base pyproject.toml
	@echo "installing what the tests need (about 3 GB, more where torch brings CUDA libraries; once)"
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo

demo: $(VENV)/.demo ## Export, build, package, serve and ask, on this machine; ARGS='--precision fp8'
	$(BIN)/twotower demo $(ARGS)
	@echo "to give such commands yourself: . $(VENV)/bin/activate"

test: $(VENV)/.dev ## All tests but the slow ones
	$(BIN)/python -m pytest -m "not slow" -n 2 $(ARGS)

cov: $(VENV)/.dev ## The same tests, and the lines that they miss
	$(BIN)/python -m pytest -m "not slow" -n 2 --cov --cov-report=term --cov-report=html $(ARGS)

test-slow: $(VENV)/.dev ## Full-size tests
	$(BIN)/python -m pytest -m "slow and not nightly" -n 2 $(ARGS)

# Each Python that we promise, and the oldest and newest compiler of our kernels, in environments of
# their own. Python 3.13 has no bundled server: tests that start one are left out there.
test-nightly: test-slow ## Every kernel for every GPU; the other Pythons and versions of the kernels' compiler; needs python3.12 and python3.13
	$(BIN)/python -m pytest -m nightly -n 2
	$(MAKE) test VENV=.venv-3.12 PYTHON=python3.12
	$(MAKE) .venv-3.13/.dev VENV=.venv-3.13 PYTHON=python3.13
	.venv-3.13/bin/python -m pytest -m "not slow and not server"
	for version in 3.6.0 3.9.0; do \
		$(MAKE) .venv-triton-$$version/.dev VENV=.venv-triton-$$version && \
		.venv-triton-$$version/bin/python -m pip install --no-deps triton==$$version && \
		.venv-triton-$$version/bin/python -m pytest -m "not slow" tests/kernels || exit 1; done

check: $(VENV)/.dev ## Lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

fix: $(VENV)/.dev ## Mend what ruff can: style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## The documentation as a site, in site/; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

wheel: $(VENV)/.dev ## Wheel and source archive, in dist/
	rm -rf dist
	$(BIN)/python -m hatchling build

test-wheel: wheel ## Install the wheel into an environment of its own and walk the path with it
	rm -rf $(VENV)/wheel && $(BIN)/python -m venv $(VENV)/wheel
	$(VENV)/wheel/bin/python -m pip install --disable-pip-version-check $(PIP_ARGS) "$$(echo dist/*.whl)[export,serve]"
	cd $(VENV)/wheel && PATH="$$PWD/bin:$$PATH" bin/twotower demo

lock: $(VENV)/.dev ## Lock the development environment anew: requirements/dev.txt
	$(BIN)/uv pip compile pyproject.toml --extra dev --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-annotate --upgrade --quiet \
		--custom-compile-command "make lock" --output-file requirements/dev.txt

locked: $(VENV)/.base ## The development environment exactly as it was locked
	$(PIP) --requirement requirements/dev.txt
	$(PIP) --no-deps -e .
	@touch $(VENV)/.dev $(VENV)/.demo

bench: $(VENV)/.dev ## All benchmarks that this machine can run; results in benchmarks/results
	for name in generation denoiser_call long_prompts scheduling serving export build traffic kernels quality layer_errors; do $(BIN)/python -m benchmarks.$$name || exit 1; done

gpu: $(VENV)/.dev ## The first hour with a GPU: tests, kernels, one step, in six minutes; results in benchmarks/results
	$(BIN)/python -m benchmarks.gpu $(ARGS)

clean: ## Remove what the targets made
	rm -rf $(VENV) .venv-* demo dist site .mypy_cache .ruff_cache .pytest_cache .coverage* htmlcov
