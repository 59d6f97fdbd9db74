# make demo | test | test-full | test-lowest | lint | docs | clean. Everything happens in .venv, made on first use.
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

.PHONY: demo test test-full test-lowest lint docs install install-dev clean
.DEFAULT_GOAL := test

demo: $(VENV)/.installed
	$(BIN)/python -m memwrap demo

test: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS)

# The whole product of methods and families, slow tests included.
test-full: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -n $(WORKERS) -m "full or not full"

# The same on the lowest supported transformers, in an environment of its own.
LOWEST := .venv-lowest
LOWEST_TRANSFORMERS := transformers==5.17.0

test-lowest: $(LOWEST)/.installed
	$(LOWEST)/bin/python -m pytest -n $(WORKERS)

$(LOWEST)/.installed: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(LOWEST)
	grep -vE '^(transformers|huggingface_hub|tokenizers)==' constraints.txt > $(LOWEST)/constraints.txt
	echo '$(LOWEST_TRANSFORMERS)' >> $(LOWEST)/constraints.txt
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt $(TORCH)
	$(LOWEST)/bin/python -m pip install --quiet --constraint $(LOWEST)/constraints.txt --editable ".[dev]"
	@touch $@

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

$(VENV)/.installed-docs: $(VENV)/.torch pyproject.toml
	$(INSTALL) --editable ".[docs]"
	@touch $(VENV)/.installed $@

clean:
	rm -rf $(VENV) $(LOWEST) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
