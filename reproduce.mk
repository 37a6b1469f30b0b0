# The evidence: what results/ holds comes out of these targets, density/ and theory/ apart (results/folders.md).
#
# make causal, forms, race, decided, reach, leaders, language, shares
#                         a study: what `study` in conf/experiment/NAME.yaml lists, runs and tables
# make reproduce-table1 … table7, fig1 … fig7   the runs of a table or figure, and it; runs-table1 …: the runs alone
# make reproduce          all of them, and what they say of each claim
# make methods            every method at both operating points with the rates found (results/cpu)
# make tune, reproduce-tune   learning rates of every method on the studied task; and of those of tables on other sets
# make data               data sets of the hub as files in data/, each with its licence and checksums
# make reports            tables, figures and an HTML page of every packed study, in its report/; of race the ranking
# make bench              time and memory of adapters, serving and whole runs (results/bench), in two hours
# make calibration-analyses   how far calibration can be trusted: agreement, reliability, stability, cost (results/analyses)
# make referee            what compare's search and its looks at seeds save, and how often they err, from the records
# make coverage           how often intervals hold the truth, from the records
# make figures, pages     the three figures at a glance; the numbers of README.md, results/ and docs/, out of these tables
# make models, first-day  every model's sizes; the defaults on tables cut out of real sets, beside searched rates
#
# PRESET=cpu     models out of PyPI wheels; digits always, and the tasks that DATA=FOLDER has
# PRESET=paper   the paper's models and sets from the hub, on GPUs
# ONLY='KEY=A,B …' leaves out commands with another value, as ONLY=task=digits; WITH='KEY=VALUE …' is added to all runs.
# WITH='hydra/launcher=joblib hydra.launcher.n_jobs=2' (the extra `sweeps`) and OMP_NUM_THREADS=1: two runs at once.
# Finished runs are skipped and interrupted ones go on, whichever table asked for them first; a run that failed is
# missing in its table, and the rest goes on. conf/experiment/NAME.yaml says what each costs and what it is to show.

# The folder of the data sets, NAME/{train,validation,test}.parquet: `make data` fills data/.
DATA ?= $(or $(firstword $(wildcard data ../shared/data)),data)
# All that the evidence takes on CPUs, but flowers17 and signdigits, of which the hub has no copy. Any task has a name here.
SETS ?= cifar10 gtsrb sst2 trec qnli imdb mrpc rte arc_easy piqa gsm8k
PRESET ?= cpu
RESULTS = results/$(PRESET)
# Of the paper's preset: where its search for learning rates lies, and the settings of its analyses; table 3 on the CPU
# takes the runs of a causal model, which last for hours (CAUSAL= leaves them out).
RATES = results$(if $(filter paper,$(PRESET)),/paper)
ANALYSES ?= $(if $(filter paper,$(PRESET)),preset=paper trainer.tuned=null task=cifar10)
CAUSAL ?= $(if $(filter cpu,$(PRESET)),causal)

STUDIES = causal forms race decided reach leaders language shares
TABLES = table1 table2 table3 table4 table5 table6 table7
FIGURES = fig1 fig2 fig3 fig4 fig5 fig6 fig7
ANALYSED = analysis-cost analysis-agreement analysis-reliability analysis-stability
OF_RUNS = $(patsubst %,runs-%,methods $(TABLES) $(FIGURES))
SCRIPT = $(BIN)/python scripts
STUDY = $(SCRIPT)/study.py $(1) --data $(DATA) --only $(2) $(ONLY) $(if $(WITH),--with $(WITH))
OTHERS = data tune reproduce-tune methods reproduce reports referee coverage models first-day bench calibration-analyses figures pages
.PHONY: $(STUDIES) $(OTHERS) $(OF_RUNS) $(ANALYSED) $(TABLES:%=reproduce-%) $(FIGURES:%=reproduce-%)
$(STUDIES) $(OTHERS) $(OF_RUNS) $(ANALYSED): | $(VENV)/.installed

data:
	$(SCRIPT)/data_sets.py $(SETS) --to $(DATA)

$(STUDIES):
	$(call STUDY,$@)

# Where a best rate is at an edge of its range, this ends with 1; the file has that rate then.
tune:
	$(call STUDY,tune,preset=$(PRESET) stage=studied)
	$(SCRIPT)/tune.py $(RATES)/tune

reproduce-tune $(RATES)/tuning.json: | $(VENV)/.installed
	$(call STUDY,tune,preset=$(PRESET))
	$(SCRIPT)/tune.py $(RATES)/tune || test $$? = 1 -a $@ != reproduce-tune

$(OF_RUNS): runs-%: | $(RATES)/tuning.json
	$(call STUDY,$*,preset=$(PRESET))
runs-table2 runs-table5 runs-fig2 runs-fig3: runs-table1
runs-table3: $(CAUSAL)
runs-fig2: runs-table3
runs-fig5: runs-table2
runs-table5: calibration-analyses
runs-fig5: analysis-agreement
runs-table7: runs-methods | results/bench/adapter.json

$(TABLES:%=reproduce-%): reproduce-%: runs-%
	$(SCRIPT)/paper_tables.py $* claims --results $(RESULTS)

# What two figures need beside the records is measured where the weights are; 3 says that some have none.
$(FIGURES:%=reproduce-%): reproduce-%: runs-%
	$(if $(filter fig3 fig7,$*),$(SCRIPT)/dynamics.py $$($(SCRIPT)/paper_figures.py $* --results $(RESULTS) --runs) || test $$? = 3)
	$(SCRIPT)/paper_figures.py $* --results $(RESULTS)

reproduce: $(TABLES:%=reproduce-%) $(FIGURES:%=reproduce-%)

methods: runs-methods
	$(BIN)/partial-lora report $(RESULTS)

# 1 says that a page leaves out some runs.
reports:
	for pack in $(filter-out results/race/%,$(wildcard results/*/runs.parquet)); do $(BIN)/partial-lora report $${pack%/*} || test $$? = 1 || exit 1; done
	$(SCRIPT)/forms.py results/race --stem race --page

referee:
	$(SCRIPT)/referee.py

coverage:
	$(SCRIPT)/intervals.py

models:
	$(SCRIPT)/model_table.py

figures:
	$(SCRIPT)/evidence.py

pages:
	$(SCRIPT)/pages.py

# FIRST_DAY=… has options of the script.
first-day:
	$(SCRIPT)/first_day.py --data $(DATA) --out results/first_day $(FIRST_DAY)

results/bench/adapter.json: | $(VENV)/.installed
	$(SCRIPT)/bench.py adapter
bench:
	for part in adapter serving starts steps methods family long threads; do $(SCRIPT)/bench.py $$part || exit 1; done

# One after the other, so that the cost is measured on an idle machine. ANALYSES='task=… model=…' sets keys for all.
# Stability is of half of the modules, by bisection: 18 calibrations. What one module gets does not depend on the others.
HALF = calibration.search=bisect 'model.target_modules=[attn.qkv,mlp.fc2]'
$(ANALYSED): analysis-%:
	$(SCRIPT)/analyses.py $* $(if $(filter stability,$*),$(HALF)) $(ANALYSES)
calibration-analyses: $(ANALYSED)
