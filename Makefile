# make demo    from nothing in two minutes after installation: calibrate, mask, train and evaluate a real ViT on real digits
# make test    everything the tests need, and the tests (JOBS=2 processes)
# make test-all   the same with all that tests skip without: other libraries, a browser, real weights (docs/developing/tests.md)
# make test-oldest   a part of the tests with the oldest versions that pyproject.toml allows, in .venv-oldest
# make test-serve   llama.cpp, built from source in some minutes, with adapters of runs, one of them over real weights
# make lint    ruff, and mypy over the public surface
# make examples   every script of examples/ and three of them as notebooks, in about ten minutes
# make docs    the documentation site, in build/site (docs-serve: on a port of this machine, while you write)
# make docs-commands   every command of README.md and docs/ that needs no hub, GPU or files of yours
# make first   the first table: five methods at two operating points on two data sets (results/first)
# make vision  a real ViT on four sets of images: the head alone, dense LoRA, Partial-LoRA at two points (results/vision)
# make encoders   the same of a real text encoder on four sets of texts (results/encoders)
# make causal  a language model on multiple choice, a mixture of two sets of texts, and generation (results/causal,
#              results/mixture); hours
# make tune    a search for the learning rate of every method, on validation (results/tune, results/tuning.json)
# make methods every method at both operating points with the rates found, three seeds (results/cpu)
# make coverage   how often intervals of differences hold the truth, simulated from the records (results/coverage)
# make longer  four times the steps, dense LoRA and two methods at 13 % (results/longer)
# make sst2-rate   dense LoRA on sst2 with a smaller learning rate (results/sst2_rate)
# make digits-rate   table 1's other images with the learning rates of digits (results/digits_rate)
# make same-rate   random and targeted masks at threshold 0.9 with one learning rate (results/same_rate)
# make reproduce-table1 … reproduce-fig7, reproduce   the evidence for the paper's claims (reproduce.mk; results/cpu)
# make forms   every form of mask at equal sizes and at rates a factor of two apart (results/forms); hours
# make race    PEFT's methods and ours at equal size, each at its best learning rate (results/race); hours
# make decided   the claims again with the power to decide them: steps, rates, seeds and rows enough (results/decided); 57 hours of a core
# make power   how many seeds decide a margin of one and two points, and how long to train, from the records (results/power)
# make reach   what share of real gradients each form of mask can reach (results/reach)
# make models  every model's parameters, adapter and bytes in one table; downloads nothing (results/models)
# make bench   time and memory of the adapter against dense LoRA, in about an hour, what calibration costs against
#              Algorithm 1 done literally, in about a quarter of an hour, many adapters on one base, and whole runs; each
#              page says what has moved since the figures committed last (results/bench)
# make calibration-analyses   how far calibration can be trusted: agreement, reliability, stability, cost (results/analyses)

PYTHON ?= python3
VENV ?= .venv
JOBS ?= 2
BIN = $(VENV)/bin
DATA ?= ../shared/data
CIFAR10 ?= $(DATA)/cifar10

.PHONY: demo docs docs-serve docs-commands test test-all test-oldest test-serve browser lint examples first vision encoders causal tune methods longer digits-rate same-rate sst2-rate forms race decided models coverage power reach bench calibration-analyses clean
.DEFAULT_GOAL := demo

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable .
	touch $@

$(VENV)/.test-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@ $(VENV)/.installed

$(VENV)/.test-all-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test-all]'
	touch $@ $(VENV)/.installed $(VENV)/.test-installed

$(VENV)/.test-serve-installed: $(VENV)/.test-installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test-serve]'
	touch $@

demo: $(VENV)/.installed
	$(BIN)/partial-lora train experiment=demo
	@echo "first:  source $(BIN)/activate"

# Files go in the order of their names: by their number of tests, those of few but long ones would come last, and alone.
PYTEST = $(BIN)/python -m pytest -n $(JOBS) --dist loadfile --no-loadscope-reorder
test: $(VENV)/.test-installed
	$(PYTEST)

# What is still skipped, and why, stands above the last line.
test-all: $(VENV)/.test-all-installed browser
	PARTIAL_LORA_TEST_DOWNLOAD=1 $(PYTEST)

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

$(VENV)/.examples-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[examples]'
	touch $@ $(VENV)/.installed

# From nothing, so that no run is skipped. The first that fails ends it. The notebooks are the scripts with their outputs.
NOTEBOOKS = own_images plain_loop plain_peft
examples: export PATH := $(BIN):$(PATH)
examples: $(VENV)/.examples-installed
	rm -rf out
	for each in examples/*.py; do echo "== $$each" && $(BIN)/python $$each || exit 1; done
	for each in examples/*.sh; do echo "== $$each" && sh $$each || exit 1; done
	rm -rf out
	$(BIN)/python scripts/notebooks.py $(NOTEBOOKS:%=examples/%.py)

$(VENV)/.docs-installed: pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]'
	touch $@ $(VENV)/.installed

docs: $(VENV)/.docs-installed
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/.docs-installed
	$(BIN)/mkdocs serve

# The commands of README.md and docs/, in about twenty minutes; DOCS=--list says which need more than this machine.
docs-commands: $(VENV)/.test-installed
	$(BIN)/python scripts/docs_commands.py $(DOCS)

# Finished runs are skipped, so an interrupted table goes on where it was.
FIRST = $(BIN)/partial-lora train -m results_dir=results/first
FIRST_CIFAR10 = task=cifar10 trainer.epochs=1 task.data_files='{train: $(CIFAR10)/train.parquet, test: $(CIFAR10)/test.parquet}'

first: $(VENV)/.installed
	$(FIRST) experiment=first_bounds task=digits
	$(FIRST) experiment=first task=digits
	$(FIRST) experiment=first_bounds $(FIRST_CIFAR10)
	$(FIRST) experiment=first $(FIRST_CIFAR10)
	$(BIN)/partial-lora report results/first

FILES = task.data_files='{train: $(DATA)/$(1)/train.parquet, test: $(DATA)/$(1)/test.parquet}'
SHOWN = $(BIN)/partial-lora train -m experiment=$(1) results_dir=results/$(1) task=$(2) $(call FILES,$(2)) $(3)
define BOTH
$(call SHOWN,$(1),$(2),method=probe$(comma)lora $(3))
$(call SHOWN,$(1),$(2),calibration=threshold$(comma)budget $(3))

endef
comma = ,

vision: $(VENV)/.installed
	$(call BOTH,vision,signdigits,)
	$(call BOTH,vision,gtsrb,)
	$(call BOTH,vision,cifar10,task.train_samples=2000)
	$(call BOTH,vision,flowers17,model.image_size=98)
	$(BIN)/partial-lora report results/vision

# mrpc and rte are calibrated alone, to see what is said of a frozen model that is hardly better than guessing.
encoders: $(VENV)/.installed
	$(call BOTH,encoders,sst2,)
	$(call BOTH,encoders,trec,)
	$(call BOTH,encoders,qnli,)
	$(call BOTH,encoders,imdb,task.train_samples=500)
	$(BIN)/partial-lora calibrate experiment=encoders results_dir=results/encoders task=mrpc $(call FILES,mrpc)
	$(BIN)/partial-lora calibrate experiment=encoders results_dir=results/encoders task=rte $(call FILES,rte)
	$(BIN)/partial-lora report results/encoders

# Questions that calibration scores: 8 take 120 curves of SmolLM2 most of an hour on one core; more are better.
SCORED ?= 8
CAUSAL = $(BIN)/partial-lora train -m experiment=causal results_dir=results/causal
MIXED = task=mixture task.members='[sst2,mrpc]' task.data_files='{sst2: {train: $(DATA)/sst2/train.parquet, \
	test: $(DATA)/sst2/test.parquet}, mrpc: {train: $(DATA)/mrpc/train.parquet, \
	validation: $(DATA)/mrpc/validation.parquet, test: $(DATA)/mrpc/test.parquet}}'
define CHOICE
$(CAUSAL) task=$(1) $(call FILES,$(1)) method=lora
$(CAUSAL) task=$(1) $(call FILES,$(1)) calibration=threshold$(comma)budget calibration.max_samples=$(SCORED)

endef

causal: $(VENV)/.installed
	$(call CHOICE,arc_easy)
	$(call CHOICE,piqa)
	$(BIN)/python scripts/zero_shot.py arc_easy=$(DATA)/arc_easy/test.parquet piqa=$(DATA)/piqa/test.parquet
	$(CAUSAL) task=gsm8k $(call FILES,gsm8k) method=lora model.max_length=512 \
		trainer.max_steps=50 trainer.save_steps=50 task.train_samples=300 task.test_samples=50
	$(BIN)/partial-lora report results/causal
	$(BIN)/partial-lora train -m experiment=encoders results_dir=results/mixture $(MIXED) method=lora
	$(BIN)/partial-lora train -m experiment=encoders results_dir=results/mixture $(MIXED) calibration=threshold,budget
	$(BIN)/partial-lora report results/mixture

# Every method, with the learning rates that `tune` finds. Finished runs are skipped.
methods: runs-methods
	$(BIN)/partial-lora report results/$(PRESET)

LONGER = $(BIN)/partial-lora train -m experiment=longer preset=cpu results_dir=results/longer
longer: $(VENV)/.installed
	$(LONGER)
	$(LONGER) method=lora calibration=threshold
	$(BIN)/partial-lora report results/longer

# What the sets of DATA=FOLDER would take without rates of their own: the file has those of digits alone.
DIGITS_RATE = $(BIN)/partial-lora train -m experiment=table1 preset=cpu results_dir=results/digits_rate \
	trainer.tuned=results/digits_rate/tuning.json $(call of_images,$(IMAGES_cpu))
digits-rate: $(VENV)/.installed
	$(if $(FILES_AT),$(DIGITS_RATE) $(DENSE))
	$(if $(FILES_AT),$(DIGITS_RATE))
	$(BIN)/python scripts/reproduce.py table1 table5 --results results/digits_rate

# Beside digits two sets of images of DATA=FOLDER, where that is there.
SAME_RATE = $(BIN)/partial-lora train -m experiment=same_rate preset=cpu results_dir=results/same_rate
same-rate: $(VENV)/.installed
	$(SAME_RATE) task=digits
	$(if $(FILES_AT),$(SAME_RATE) task=cifar10$(comma)signdigits $(OF_FILES_cpu) task.test_samples=1000)
	$(BIN)/partial-lora report results/same_rate

# Every form of mask at equal sizes (conf/experiment/forms.yaml). Texts take rates twice as high.
PLAIN = mask.fan_in=dense+mask.row_exponent=0
KEPT = mask.fan_in=kept+mask.row_exponent=0
SCALED = mask.fan_in=kept+mask.row_exponent=1
FORMS = method=lora method=low_rank method=random_weights \
	method=partial+$(PLAIN) method=partial+$(KEPT) method=partial+$(SCALED) method=partial+$(SCALED)+method.rank=auto \
	method=entries+$(PLAIN) method=entries+$(KEPT) method=entries+$(SCALED) method=ticket+mask.row_exponent=1+mask.column_exponent=0.5 \
	method=partial+mask=units+$(SCALED) method=partial+mask=groups method=partial+mask=frozen+mask.row_exponent=1
FORM_SIZES = calibration.budget=0.13,0.02
FORM_TASKS = task=digits $(if $(FILES_AT),task=trec+model=$(TEXT_MODEL_cpu) task=gtsrb+model.image_size=56+task.test_samples=1000)
spaced = $(subst +,$(empty) $(empty),$(1))
FORM_RUN = $(BIN)/partial-lora train -m experiment=forms preset=cpu results_dir=results/forms $(LAUNCH) \
	$(if $(FILES_AT),data_dir=$(FILES_AT)) $(call spaced,$(1)) $(call spaced,$(2)) $(if $(filter method=lora,$(2)),,$(FORM_SIZES))
# Plain LoRA on some modules alone: as many parameters as low_rank has on all of them, and less memory.
SOME_MODULES = $(BIN)/partial-lora compare experiment=race results_dir=results/forms \
	$(if $(FILES_AT),data_dir=$(FILES_AT)) rates=3 methods=[lora] $(call spaced,$(1)) \
	$(if $(findstring trec,$(1)),model.target_modules=[query$(comma)value] method.rank=9 method.alpha=9,model.target_modules=[attn.qkv] method.rank=8 method.alpha=8)
forms: $(VENV)/.installed
	$(foreach task,$(FORM_TASKS),$(foreach form,$(FORMS),$(call FORM_RUN,$(task),$(form)) || test $$? = 1 &&)) true
	$(foreach task,$(FORM_TASKS),$(call SOME_MODULES,$(task)) || test $$? = 1 &&) true
	$(BIN)/python scripts/forms.py results/forms

# PEFT's methods beside ours (conf/experiment/race.yaml).
RACERS = low_rank,partial,entries,random_weights,dora,vera,lokr,loha,hira,pissa,psoft,oft,unilora,fourierft,randlora,gralora,lora
RACE = $(BIN)/partial-lora compare experiment=race results_dir=results/race rates=3 \
	$(if $(FILES_AT),data_dir=$(FILES_AT)) methods=[$(RACERS)] budgets=[0.13,0.02]
race: $(VENV)/.installed
	$(foreach task,$(FORM_TASKS),$(RACE) $(call spaced,$(task)) || test $$? = 1 &&) true
	$(BIN)/python scripts/forms.py results/race --stem race --page

# The claims with the power to decide them (conf/experiment/decided.yaml): sets, and stages of each, in this order.
DECIDED ?= digits trec sst2 gtsrb cifar10 signdigits flowers17
STAGES ?= first which point shares
RACE_BEST ?= entries,dora
IN_digits = task=digits task.test_share=0.5 trainer.max_steps=300
IN_trec = task=trec model=$(TEXT_MODEL_cpu) trainer.max_steps=300
IN_sst2 = task=sst2 model=$(TEXT_MODEL_cpu) trainer.max_steps=300
IN_qnli = task=qnli model=$(TEXT_MODEL_cpu) trainer.max_steps=300
IN_gtsrb = task=gtsrb model.image_size=56 trainer.max_steps=600
IN_cifar10 = task=cifar10 model.image_size=56 trainer.max_steps=600
IN_signdigits = task=signdigits model.image_size=56 trainer.max_steps=600
IN_flowers17 = task=flowers17 model.image_size=56 trainer.max_steps=600
IN_mixture = task=mixture task.members=[digits$(comma)signdigits] model.image_size=56 trainer.max_steps=600
IN_arc_easy = task=arc_easy model=smollm2_135m model.target_modules=[q_proj$(comma)v_proj] trainer.max_steps=300 \
	trainer.head_learning_rate=null calibration.search=gradient
of_decided = experiment=decided preset=cpu results_dir=results/decided \
	$(if $(FILES_AT),data_dir=$(FILES_AT)) calibration.max_samples=$(if $(filter arc_easy,$(1)),8,160) $(IN_$(1))
SEARCHED_BY = $(BIN)/partial-lora compare $(call of_decided,$(1)) rates=3 seeds=8 methods=[$(2)] budgets=[0.13] $(3) || test $$? = 1
SUITED = $(BIN)/partial-lora train -m $(call of_decided,$(1)) $(MANY) trainer.learning_rate=auto $(2) || test $$? = 1
AS_PEFT = mask.fan_in=dense mask.row_exponent=0
define STAGE_first
$(call SEARCHED_BY,$(1),lora$(comma)low_rank$(comma)partial$(comma)targeted$(comma)uniform$(comma)random_weights)

endef
define STAGE_which
$(call SEARCHED_BY,$(1),partial,mask=element $(AS_PEFT))
$(call SEARCHED_BY,$(1),partial,$(AS_PEFT))
$(call SEARCHED_BY,$(1),$(RACE_BEST),$(AS_PEFT))

endef
define STAGE_point
$(call SUITED,$(1),calibration=threshold method=partial$(comma)targeted$(comma)uniform)
$(call SUITED,$(1),calibration=threshold method=partial calibration.search=gradient)

endef
# The rate that the first stage chose for partial, where it is done.
RATE_digits = 2e-3
RATE_trec = 1e-3
AT_ITS_RATE = $(BIN)/partial-lora train -m $(call of_decided,$(1)) $(MANY) \
	trainer.learning_rate=$(or $(RATE_$(1)),auto) $(2) || test $$? = 1
define SHARES
$(call AT_ITS_RATE,$(1),method=partial calibration.search=gradient)
$(call AT_ITS_RATE,$(1),method=partial calibration.shrink=0$(comma)0.5$(comma)2)
$(call AT_ITS_RATE,$(1),method=uniform$(comma)shuffled)
$(call AT_ITS_RATE,$(1),method=partial calibration.levels=0.01 calibration.max_sparsity=0.99)

endef
STAGE_shares = $(if $(filter digits trec gtsrb,$(1)),$(SHARES))
decided: $(VENV)/.installed
	$(foreach task,$(if $(FILES_AT),$(DECIDED),$(filter digits,$(DECIDED))),$(foreach stage,$(STAGES),$(call STAGE_$(stage),$(task))))
	$(BIN)/python scripts/decided.py results/decided

SST2_RATE = $(BIN)/partial-lora train -m experiment=sst2_rate preset=cpu results_dir=results/sst2_rate $(call of_texts,sst2)
sst2-rate: $(VENV)/.installed
	$(SST2_RATE)
	$(SST2_RATE) method=lora calibration=threshold trainer.tuned=null trainer.learning_rate=1e-3
	$(BIN)/partial-lora report results/sst2_rate

include reproduce.mk

coverage: $(VENV)/.installed
	$(BIN)/python scripts/interval_coverage.py

power: $(VENV)/.installed
	$(BIN)/python scripts/power.py

REACH = $(BIN)/python scripts/reach.py $(if $(FILES_AT),data_dir=$(FILES_AT))
reach: $(VENV)/.installed
	$(REACH) task=digits
	$(if $(FILES_AT),$(REACH) task=gtsrb model.image_size=56)
	$(if $(FILES_AT),$(REACH) task=trec model=$(TEXT_MODEL_cpu))
	$(if $(FILES_AT),$(REACH) task=cifar10 model.image_size=56)

models: $(VENV)/.installed
	$(BIN)/python scripts/model_table.py

# An interrupted benchmark goes on where it was, too. BENCH=--profile shows where the time goes instead.
bench: $(VENV)/.installed
	$(BIN)/python scripts/bench_adapter.py $(BENCH)
	$(if $(BENCH),,$(BIN)/python scripts/bench_calibration.py)
	$(if $(BENCH),,$(BIN)/python scripts/bench_serving.py)
	$(if $(BENCH),,$(foreach part,starts steps methods long threads,$(BIN)/python scripts/bench_runs.py $(part) &&) true)

# One after the other, so that the cost is measured on an idle machine. ANALYSES='task=... model=...' sets keys for all.
# Stability is of half of the modules, by bisection: 18 calibrations. What one module gets does not depend on the others.
HALF = 'model.target_modules=[attn.qkv,mlp.fc2]'
calibration-analyses: $(VENV)/.installed
	$(BIN)/python scripts/analyses.py cost $(ANALYSES)
	$(BIN)/python scripts/analyses.py agreement $(ANALYSES)
	$(BIN)/python scripts/analyses.py reliability $(ANALYSES)
	$(BIN)/python scripts/analyses.py stability calibration.search=bisect $(HALF) $(ANALYSES)

clean:
	rm -rf $(VENV) $(VENV)-oldest build dist
