# The evidence: what results/ holds comes out of these targets, density/ and theory/ apart (results/folders.md).
#
# make race, decided, language
#                         a study: what `study` in conf/experiment/NAME.yaml lists, runs and tables
# make reproduce-table1 … table7, fig1 … fig7   the runs of a table or figure, which are of `decided`, and it
# make reproduce          all of them, and what they say of each claim
# make data               data sets of the hub as files in data/, each with its licence and checksums
# make reports            tables, figures and an HTML page of every packed study, in its report/; of race the ranking
# make bench              time and memory of adapters and of whole runs (results/bench), in two hours
# make calibration-analyses   how far calibration can be trusted: agreement, reliability, stability, cost (results/analyses)
# make referee            what compare's search and its looks at seeds save, and how often they err, from the records
# make coverage           how often intervals hold the truth, from the records
# make figures, pages     the four figures at a glance; the numbers of README.md, results/ and docs/, out of these tables
# make models, first-day  every model's sizes, and what a step keeps; the defaults on tables cut out of real sets, beside searched rates
#
# PRESET=cpu     models out of PyPI wheels; digits always, and the tasks that DATA=FOLDER has
# PRESET=paper   the paper's models and sets from the hub, on GPUs
# ONLY='KEY=A,B …' leaves out commands with another value, as ONLY=task=digits; WITH='KEY=VALUE …' is added to all runs.
# WITH='hydra/launcher=joblib hydra.launcher.n_jobs=2' (the extra `sweeps`) and OMP_NUM_THREADS=1: two runs at once.
# Finished runs are skipped and interrupted ones go on, whichever table asked for them first; most of those of the tables
# are finished in a fresh checkout. A run that failed is missing in its table, and the rest goes on. conf/experiment/NAME.yaml
# says what each costs, docs/evidence/plan.md what it is to show.

# The folder of the data sets, NAME/{train,validation,test}.parquet: `make data` fills data/.
DATA ?= $(or $(firstword $(wildcard data ../shared/data)),data)
# All that the evidence takes on CPUs, but flowers17 and signdigits, of which the hub has no copy. Any task has a name here.
SETS ?= cifar10 gtsrb sst2 trec qnli imdb mrpc rte arc_easy piqa gsm8k
PRESET ?= cpu
RESULTS = results/$(if $(filter cpu,$(PRESET)),decided,$(PRESET))
# Settings of the analyses with the paper's preset.
ANALYSES ?= $(if $(filter paper,$(PRESET)),preset=paper task=cifar10)

STUDIES = race decided language
TABLES = table1 table2 table3 table4 table5 table6 table7
FIGURES = fig1 fig2 fig3 fig4 fig5 fig6 fig7
ANALYSED = analysis-cost analysis-agreement analysis-reliability analysis-stability
SCRIPT = $(BIN)/python scripts
STUDY = $(SCRIPT)/study.py $(1) --data $(DATA) --only $(2) $(ONLY) $(if $(WITH),--with $(WITH))
OTHERS = data reproduce reports referee coverage models first-day bench calibration-analyses figures pages screen
VIEWS = $(TABLES:%=reproduce-%) $(FIGURES:%=reproduce-%)
.PHONY: $(STUDIES) $(OTHERS) $(ANALYSED) $(VIEWS)
$(STUDIES) $(OTHERS) $(ANALYSED) $(VIEWS): | $(VENV)/.installed

data:
	$(SCRIPT)/data_sets.py $(SETS) --to $(DATA)

$(STUDIES):
	$(call STUDY,$@,preset=$(PRESET))

reproduce-fig5: analysis-agreement
reproduce-table7: results/bench/adapter.json
$(TABLES:%=reproduce-%): reproduce-%:
	$(call STUDY,$*,preset=$(PRESET))
	$(SCRIPT)/paper_tables.py $* --results $(RESULTS)

# What two figures need beside the records is measured where the weights are; 3 says that some have none.
$(FIGURES:%=reproduce-%): reproduce-%:
	$(call STUDY,$*,preset=$(PRESET))
	$(if $(filter fig3 fig7,$*),$(SCRIPT)/dynamics.py $$($(SCRIPT)/paper_figures.py $* --results $(RESULTS) --runs) || test $$? = 3)
	$(SCRIPT)/paper_figures.py $* --results $(RESULTS)

reproduce: $(VIEWS) calibration-analyses
	$(SCRIPT)/paper_tables.py claims --results $(RESULTS)

reports:
	for pack in $(filter-out results/race/%,$(wildcard results/*/runs.parquet)); do $(BIN)/partial-lora report $${pack%/*} || exit 1; done
	$(SCRIPT)/race.py results/race --page

referee:
	$(SCRIPT)/referee.py

coverage:
	$(SCRIPT)/intervals.py

models:
	$(SCRIPT)/model_table.py
	$(SCRIPT)/model_table.py --kept

figures:
	$(SCRIPT)/evidence.py

pages:
	$(SCRIPT)/pages.py

# The picture of a terminal in README.md: the demo, a prediction, a checked export.
screen:
	PATH=$(abspath $(VENV))/bin:$$PATH $(SCRIPT)/screen.py docs/demo 'partial-lora train experiment=demo' \
		'partial-lora predict latest results/latest/example.png' 'partial-lora export latest --to merged --check'

# FIRST_DAY=… has options of the script.
first-day:
	$(SCRIPT)/first_day.py --data $(DATA) --out results/first_day $(FIRST_DAY)

results/bench/adapter.json: | $(VENV)/.installed
	$(SCRIPT)/bench.py adapter
bench:
	for part in adapter methods long growth; do $(SCRIPT)/bench.py $$part || exit 1; done

# One after the other, so that the cost is measured on an idle machine. ANALYSES='task=… model=…' sets keys for all.
# Stability is of half of the modules, by bisection: 18 calibrations. What one module gets does not depend on the others.
HALF = calibration.search=bisect 'model.target_modules=[attn.qkv,mlp.fc2]'
$(ANALYSED): analysis-%:
	$(SCRIPT)/analyses.py $* $(if $(filter stability,$*),$(HALF)) $(ANALYSES)
calibration-analyses: $(ANALYSED)
