# make demo    from nothing in two minutes after installation: calibrate, mask, train and evaluate a real ViT on real digits
# make test    everything the tests need, and the tests (JOBS=2 processes)
# make test-all   the same with all that tests skip without: other libraries, a browser, real weights (docs/developing/tests.md)
# make test-oldest   a part of the tests with the oldest versions that pyproject.toml allows, in .venv-oldest
# make test-serve   llama.cpp, built from source in some minutes, with adapters of runs, one of them over real weights
# make lint    ruff, and mypy over the public surface
# make examples   every script of examples/ and three of them as notebooks, in about ten minutes
# make docs    the documentation site, in build/site (docs-serve: on a port of this machine, while you write)
# make docs-commands   every command of README.md and docs/ that needs no hub, GPU or files of yours
# make browser, clean   Chromium for the tests of the page; what make has installed and built goes
# make data    data sets of the hub in data/, for the evidence and for the tests that read real rows (SETS=… for some)
# make race … calibration-analyses, reproduce   the evidence: every table, figure and benchmark of results/ (reproduce.mk)

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN = $(VENV)/bin

.PHONY: demo docs docs-serve docs-commands test test-all test-oldest test-serve browser lint examples clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

# Of an extra of pyproject.toml.
$(VENV)/.%-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[$*]'
	touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/partial-lora train experiment=demo
	@echo "first:  source $(BIN)/activate"

# Files go in the order of their names: by their number of tests, those of few but long ones would come last, and alone.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/.test-installed
	$(PYTEST)

# What is still skipped, and why, stands above the last line.
test-all: $(VENV)/.test-all-installed browser
	PARTIAL_LORA_TEST_DOWNLOAD=1 PARTIAL_LORA_TEST_TYPES=1 $(PYTEST)

# uv finds them; the newest of what they bring along. Downloads torch with its libraries for GPUs: 4 GB.
OLDEST = adapter/test_adapter.py adapter/test_adapter_embedding.py adapter/test_compact.py calibration/test_calibrating.py \
	tasks/test_prompts.py tasks/test_sources.py training/test_objectives.py finished/test_evaluate_run.py
test-oldest:
	$(PYTHON) -m venv --clear $(VENV)-oldest
	$(VENV)-oldest/bin/python -m pip install --quiet --disable-pip-version-check uv
	$(VENV)-oldest/bin/uv pip install --quiet --python $(VENV)-oldest/bin/python --resolution lowest-direct \
		--editable . 'pytest>=8' 'pytest-xdist>=3.8'
	$(VENV)-oldest/bin/python -m pytest -n $(JOBS) $(addprefix tests/,$(OLDEST))

test-serve: $(VENV)/.test-serve-installed
	PARTIAL_LORA_TEST_DOWNLOAD=1 $(BIN)/python -m pytest -rP tests/finished/test_llama_cpp.py

# Chromium, for the tests of the report's page; no failure where it cannot be installed.
browser:
	@for each in chromium chromium-browser google-chrome; do command -v $$each && exit; done; \
	if [ "$$(id -u)" = 0 ] && command -v apt-get && timeout 300 apt-get update && \
		DEBIAN_FRONTEND=noninteractive timeout 600 apt-get install -y --no-install-recommends chromium; then exit; fi \
		>/dev/null 2>&1; \
	echo "no Chromium, and it cannot be installed (that takes root, apt-get and a network): no browser opens the page"

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# From nothing, so that no run is skipped. The first that fails ends it. The notebooks are the scripts with their outputs.
NOTEBOOKS = own_images plain_loop plain_peft
examples: export PATH := $(BIN):$(PATH)
examples: $(VENV)/.examples-installed
	rm -rf out
	for each in examples/*.py; do echo "== $$each" && $(BIN)/python $$each || exit 1; done
	for each in examples/*.sh; do echo "== $$each" && sh $$each || exit 1; done
	rm -rf out
	$(BIN)/python scripts/notebooks.py $(NOTEBOOKS:%=examples/%.py)

docs: $(VENV)/.docs-installed
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs-installed
	$(BIN)/mkdocs serve

# The commands of README.md and docs/, in about twenty minutes; DOCS=--list says which need more than this machine.
docs-commands: $(VENV)/.test-installed
	$(BIN)/python scripts/docs_commands.py $(DOCS)

include reproduce.mk

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist
