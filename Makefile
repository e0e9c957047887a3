# From a clean clone: `make demo` and `make test`. The environment is made once, in .venv, and reused until
# pyproject.toml or constraints.txt changes.

PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
WORKDIR ?= .demo

# constraints.txt names the exact versions. PyTorch goes in first and alone: with it in place, nothing later asks for
# another build of it. Where pip finds a build without GPU libraries (a local version such as 2.0.0+cpu), it takes that.
TORCH := $(shell grep -E '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test test-browser test-all lint wheel-check dist docs clean

help:  ## Show the targets.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/.demo-ready  ## Train five small models, merge them three ways on a local Hub, print a table (minutes).
	$(BIN)/python -m examples.demo.run --workdir "$(WORKDIR)"

test: $(VENV)/.test-ready  ## Run the tests.
	$(BIN)/python -m pytest -q -n auto --dist worksteal

test-browser: $(VENV)/.test-ready  ## Run the tests of the web form that need Chromium (Debian: apt install chromium).
	$(BIN)/python -m pytest -q -m browser tests/browser

test-all: $(VENV)/.test-ready  ## Run all tests, the slow ones too.
	$(BIN)/python -m pytest -q -m "slow or browser or not slow"

docs: $(VENV)/.test-ready  ## Generate the reference page of the methods.
	$(BIN)/hubmerge methods --markdown > docs/methods.md

lint: $(VENV)/.test-ready  ## Check style, types and layers.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

wheel-check: $(VENV)/.test-ready  ## Build the wheel, unpack it elsewhere, and run what is in it.
	rm -rf build/wheel && mkdir -p build/wheel
	$(PIP) wheel -q --no-deps -w build/wheel .
	$(PIP) install -q --no-deps --target build/wheel/unpacked build/wheel/hubmerge-*.whl
	test -f build/wheel/unpacked/hubmerge/py.typed
	cd build/wheel/unpacked && PYTHONPATH="$$PWD" "$(abspath $(BIN))/python" -c \
		"import pathlib, hubmerge; assert pathlib.Path(hubmerge.__file__).is_relative_to(pathlib.Path.cwd())"
	cd build/wheel/unpacked && PYTHONPATH="$$PWD" "$(abspath $(BIN))/python" -m hubmerge --version

dist: $(VENV)/.torch-ready  ## Build what is released, in dist/.
	$(PIP) install -q -c constraints.txt build
	rm -rf dist
	$(BIN)/python -m build

clean:  ## Remove the environment, the demo's folder and what was built.
	rm -rf "$(VENV)" .demo build dist

$(VENV)/.torch-ready: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install -q -c constraints.txt '$(TORCH)'
	@touch $@

$(VENV)/.demo-ready: $(VENV)/.torch-ready pyproject.toml
	$(PIP) install -q -c constraints.txt -e '.[demo]'
	@touch $@

$(VENV)/.test-ready: $(VENV)/.torch-ready pyproject.toml
	$(PIP) install -q -c constraints.txt -e '.[demo,test]'
	@touch $@
