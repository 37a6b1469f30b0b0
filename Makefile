# make demo    the main job on the embedded default, from nothing: install, calibrate, mask, train, evaluate
# make test    everything the tests need, and the tests (JOBS=2 processes)
# make lint    ruff
# make first   the first table: five methods at two operating points on two data sets (results/first)
# make bench   time and memory of the adapter against dense LoRA, in about an hour, and what calibration costs against
#              Algorithm 1 done literally, in about a quarter of an hour (results/bench)
# make calibration-analyses   how far calibration can be trusted: agreement, reliability, stability, cost (results/analyses)

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN = $(VENV)/bin
CIFAR10 ?= ../shared/data/cifar10

.PHONY: demo test lint first bench calibration-analyses clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ $(VENV)/.installed

demo: $(VENV)/.installed
	$(BIN)/partial-lora train

test: $(VENV)/.test-installed
	$(BIN)/python -m pytest -n $(JOBS) --dist loadfile

lint: $(VENV)/.test-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Finished runs are skipped, so an interrupted table goes on where it was.
FIRST = $(BIN)/partial-lora train -m results_dir=results/first
FIRST_CIFAR10 = task=cifar10 trainer.epochs=1 task.data_files='{train: $(CIFAR10)/train.parquet, test: $(CIFAR10)/test.parquet}'

first: $(VENV)/.installed
	$(FIRST) experiment=first_bounds task=digits
	$(FIRST) experiment=first task=digits
	$(FIRST) experiment=first_bounds $(FIRST_CIFAR10)
	$(FIRST) experiment=first $(FIRST_CIFAR10)
	$(BIN)/partial-lora report results/first

# An interrupted benchmark goes on where it was, too. BENCH=--profile shows where the time goes instead.
bench: $(VENV)/.installed
	$(BIN)/python scripts/bench_adapter.py $(BENCH)
	$(if $(BENCH),,$(BIN)/python scripts/bench_calibration.py)

# One after the other, so that the cost is measured on an idle machine. ANALYSES='task=... model=...' sets keys for all.
calibration-analyses: $(VENV)/.installed
	$(BIN)/partial-lora analyse cost $(ANALYSES)
	$(BIN)/partial-lora analyse agreement $(ANALYSES)
	$(BIN)/partial-lora analyse reliability $(ANALYSES)
	$(BIN)/partial-lora analyse stability $(ANALYSES)

clean:
	rm -rf $(VENV) build dist
