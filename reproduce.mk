# The evidence: what results/ holds comes out of these targets, density/ and theory/ apart (results/folders.md).
#
# make tune                          learning rates of every method on the studied task (results/tune, results/tuning.json)
# make reproduce-tune                the same, and of the other sets those of lora, partial and targeted
# make reproduce-table1 … table7     a table's runs, and the table (results/PRESET/tables)
# make reproduce-fig1 … fig7         a figure's runs, and the figure (results/PRESET/figures)
# make reproduce                     all of them, and what they say of each claim
# make runs-table1 …                 the runs alone
#
# make data                          data sets of the hub as files in data/, each with its licence and checksums
#
# PRESET=cpu     models out of PyPI wheels; digits always, and the tasks that DATA=FOLDER has
# PRESET=paper   the paper's models and sets from the hub, on GPUs
# Finished runs are skipped and interrupted ones go on, whichever table asked for them first; a run that failed is
# missing in its table, and the rest goes on. conf/experiment/NAME.yaml says what each costs and what it is to show.
# LAUNCH='hydra/launcher=joblib hydra.launcher.n_jobs=2' (the extra `sweeps`) and OMP_NUM_THREADS=1: two runs at once.
#
# make first   the first table: five methods at two operating points on two data sets (results/first)
# make vision  a real ViT on four sets of images: the head alone, dense LoRA, Partial-LoRA at two points (results/vision)
# make encoders   the same of a real text encoder on four sets of texts (results/encoders)
# make causal  a language model on multiple choice, a mixture of two sets of texts, and generation (results/causal,
#              results/mixture); hours
# make methods every method at both operating points with the rates found, three seeds (results/cpu)
# make coverage   how often intervals of differences hold the truth, simulated from the records (results/coverage)
# make longer  four times the steps, dense LoRA and two methods at 13 % (results/longer)
# make sst2-rate   dense LoRA on sst2 with a smaller learning rate (results/sst2_rate)
# make digits-rate   table 1's other images with the learning rates of digits (results/digits_rate)
# make same-rate   random and targeted masks at threshold 0.9 with one learning rate (results/same_rate)
# make forms   every form of mask at equal sizes and at rates a factor of two apart (results/forms); hours
# make race    PEFT's methods and ours at equal size, each at its best learning rate (results/race); hours
# make decided   the claims again with the power to decide them: steps, rates, seeds and rows enough (results/decided); 68 hours of a core
# make first-day   the defaults on tables and folders cut out of real sets, beside searched rates (results/first_day); hours
# make power   how many seeds decide a margin of one and two points, and how long to train, from the records (results/power)
# make reach   what share of real gradients each form of mask can reach (results/reach)
# make models  every model's parameters, adapter and bytes in one table; downloads nothing (results/models)
# make bench   time and memory of the adapter against dense LoRA, in about an hour, what calibration costs against
#              Algorithm 1 done literally, in about a quarter of an hour, many adapters on one base, and whole runs; each
#              page says what has moved since the figures committed last (results/bench)
# make reports   tables, figures and an HTML page of every packed study, in its report/; of race the ranking
# make figures, pages   the three figures at a glance; results/README.md and a page for each claim, out of the tables
# make calibration-analyses   how far calibration can be trusted: agreement, reliability, stability, cost (results/analyses)

# The folder of the data sets, NAME/{train,validation,test}.parquet: `make data` fills data/.
DATA ?= $(or $(firstword $(wildcard data ../shared/data)),data)
CIFAR10 ?= $(DATA)/cifar10
# All that the evidence takes on CPUs, but flowers17 and signdigits, of which the hub has no copy. Any task has a name here.
SETS ?= cifar10 gtsrb sst2 trec qnli imdb mrpc rte arc_easy piqa gsm8k
data: $(VENV)/.installed
	$(BIN)/python scripts/data_sets.py $(SETS)


.PHONY: data first first-day vision encoders causal methods longer digits-rate same-rate sst2-rate forms race decided reports figures pages models coverage power reach bench calibration-analyses

PRESET ?= cpu
RESULTS = results/$(PRESET)
empty =
listed = $(subst $(empty) $(empty),$(comma),$(strip $(1)))
known = $(if $(strip $(1)),$(2))

# A run that failed ends a sweep with 1, settings that are refused with 2.
RUN = $(BIN)/partial-lora train -m experiment=$(1) preset=$(PRESET) $(strip $(2) $(LAUNCH)) || test $$? = 1

# A preset's models and tasks. One task is studied closely: it has more seeds, all methods and most figures. Learning
# rates of the others are searched for, too, and of RATED_MIXTURES; other mixtures take the studied task's (trainer.tuned_on).
FILES_AT = $(wildcard $(DATA))
# Of some sets those that are there; digits are everywhere.
there = $(strip $(foreach set,$(1),$(if $(filter digits,$(set))$(wildcard $(DATA)/$(set)/train.parquet),$(set))))
MODEL_cpu = vit_s14
TEXT_MODEL_cpu = minilm_l6
STUDIED_cpu = task=digits
IMAGES_cpu = $(call there,cifar10 signdigits gtsrb flowers17)
PHOTOGRAPHS_cpu = $(call there,flowers17)
TEXTS_cpu = $(call there,sst2 trec)
MIXED_IMAGES_cpu = $(if $(call there,signdigits),digits signdigits)
OF_FILES_cpu = $(if $(FILES_AT),data_dir=$(FILES_AT) calibration.max_samples=160 calibration.seed=0)
OF_IMAGES_cpu = task.test_samples=1000 trainer.tuned_on=digits
OF_TEXTS_cpu = model=$(TEXT_MODEL_cpu) task.test_samples=1000
FEW_cpu = task.train_samples=150 trainer.epochs=12
TUNED_cpu = results/tuning.json
SEARCHED_cpu = results/tune
RATES_OF_IMAGES_cpu = trainer.learning_rate=3e-4,1e-3,3e-3,1e-2
SEARCH_OF_TEXTS_cpu = seed=1000,1001,1002
HIGHER_OF_TEXTS_cpu = $(WIDER)

MODEL_paper = vit_b16
TEXT_MODEL_paper = deberta_v3_base
STUDIED_paper = task=cifar10
IMAGES_paper = cifar100 caltech101 dtd eurosat flowers102 oxford_pets svhn
PHOTOGRAPHS_paper = flowers102
TEXTS_paper = sst2 cola mnli mrpc qnli qqp rte stsb
MIXED_IMAGES_paper = cifar10 svhn
MIXED_TEXTS_paper = sst2 mrpc
OF_TEXTS_paper = model=$(TEXT_MODEL_paper)
RATED_MIXTURES_paper = mixture
FEW_paper = task.train_samples=500 trainer.epochs=100
TUNED_paper = results/paper/tuning.json
SEARCHED_paper = results/paper/tune
CAUSAL_paper = llama2_7b llama3_1_8b qwen2_5_14b
CHOICES_paper = arc_challenge arc_easy boolq hellaswag openbookqa piqa social_iqa winogrande
ANALYSES_paper = preset=paper trainer.tuned=null task=cifar10

STUDIED = $(STUDIED_$(PRESET))
of_images = $(call known,$(1),task=$(call listed,$(1)) $(OF_FILES_$(PRESET)) $(OF_IMAGES_$(PRESET)))
of_texts = $(call known,$(1),task=$(call listed,$(1)) $(OF_FILES_$(PRESET)) $(OF_TEXTS_$(PRESET)))
IMAGES = $(call of_images,$(IMAGES_$(PRESET)))
PHOTOGRAPHS = $(call of_images,$(PHOTOGRAPHS_$(PRESET)))
TEXTS = $(call of_texts,$(TEXTS_$(PRESET)))
mixed = task=mixture 'task.members=[$(call listed,$(1))]' $(OF_FILES_$(PRESET))
MIXED_IMAGES = $(call known,$(MIXED_IMAGES_$(PRESET)),$(call mixed,$(MIXED_IMAGES_$(PRESET))) $(OF_IMAGES_$(PRESET)))
MIXED_TEXTS = $(call known,$(MIXED_TEXTS_$(PRESET)),$(call mixed,$(MIXED_TEXTS_$(PRESET))) $(OF_TEXTS_$(PRESET)))
ANALYSES ?= $(ANALYSES_$(PRESET))

MANY = seed=0,1,2,3,4,5,6,7
POINTS = calibration=threshold,budget
CONTROLS = method=partial,targeted,uniform,shuffled,inverted,low_rank,random_weights
CALIBRATED = $(CONTROLS),flow
ELEMENT = method=partial mask=element
PEERS = dora,adalora,lorafa,vera,probe,full
UNCALIBRATED = method=lora,$(PEERS) calibration=threshold
DENSE = method=lora calibration=threshold

# Five learning rates for every method on the studied task, and for what the tables of the other tasks have on those.
# Of other images the CPU searches four, about those of the studied task. Where the best is at an edge tune.py says so; the
# committed file then has a fifth of that set, 3e-2, which the same command with trainer.learning_rate=3e-2 has tried.
# An encoder's best rates lie higher and depend on the seed: on texts it searches three seeds.
TUNED = $(TUNED_$(PRESET))
SEARCHED = $(SEARCHED_$(PRESET))
TUNE = $(call RUN,tune,results_dir=$(SEARCHED) $(1))
HIGHER = trainer.learning_rate=3e-4,1e-3,3e-3,1e-2,3e-2
WIDER = trainer.learning_rate=1e-3,3e-3,1e-2,3e-2,1e-1
HIGHEST = trainer.learning_rate=3e-3,1e-2,3e-2,1e-1,3e-1
LOWER = trainer.learning_rate=1e-5,3e-5,1e-4,3e-4,1e-3
# Figure 6's, with its one calibration: sparser adapters take larger rates.
FEWER = calibration=budget calibration.budget=0.05,0.02,0.01 calibration.levels=0.01 calibration.max_sparsity=0.99 \
	calibration.seed=0
KEEP_BEST = $(BIN)/python scripts/tune.py $(SEARCHED) --out $(TUNED)

define TUNE_STUDIED
$(call TUNE,$(STUDIED) method=lora$(comma)dora$(comma)adalora$(comma)lorafa)
$(call TUNE,$(STUDIED) method=vera$(comma)probe $(HIGHEST))
$(call TUNE,$(STUDIED) method=full $(LOWER))
$(call TUNE,$(STUDIED) $(CALIBRATED) $(POINTS) $(HIGHER))
$(call TUNE,$(STUDIED) $(ELEMENT) $(POINTS) $(HIGHER))
$(call TUNE,$(STUDIED) $(FEWER) method=partial $(WIDER))
$(call TUNE,$(STUDIED) $(FEWER) method=low_rank $(HIGHER))

endef

define TUNE_OTHER
$(call TUNE,$(1) method=lora $(4))
$(call TUNE,$(1) method=$(2) $(POINTS) $(or $(3),$(HIGHER)))

endef

# Of images, of texts, and of mixtures: what is searched for on the tasks given, whichever there are.
define TUNE_OTHERS
$(call known,$(1),$(call TUNE_OTHER,$(call of_images,$(1)),partial$(comma)targeted,$(RATES_OF_IMAGES_$(PRESET)),$(RATES_OF_IMAGES_$(PRESET))))
$(call known,$(2),$(call TUNE_OTHER,$(call of_texts,$(2)) $(SEARCH_OF_TEXTS_$(PRESET)),partial$(comma)targeted,$(HIGHER_OF_TEXTS_$(PRESET))))
$(call known,$(3),$(call known,$(MIXED_IMAGES),$(call TUNE_OTHER,$(MIXED_IMAGES),partial)))
$(call known,$(4),$(call known,$(MIXED_TEXTS),$(call TUNE_OTHER,$(MIXED_TEXTS),partial)))

endef

define TUNE_ALL
$(TUNE_STUDIED)
$(call TUNE_OTHERS,$(IMAGES_$(PRESET)),$(TEXTS_$(PRESET)),$(RATED_MIXTURES_$(PRESET)),$(RATED_MIXTURES_$(PRESET)))

endef

.PHONY: tune reproduce-tune
tune: $(VENV)/.installed
	$(TUNE_STUDIED)
	$(KEEP_BEST)

reproduce-tune: $(VENV)/.installed
	$(TUNE_ALL)
	$(KEEP_BEST)

# Of what the file has rates for, committed ones among them, nothing is searched: of what a table has no runs of, neither.
# A best rate at an edge, for which tune.py ends with 1, is used, too.
RATED = $(shell grep -s -A2 '"task": "$(1)"' $(TUNED) | grep -A1 '"model": "$(2)"' | grep '"method": "$(3)"')
unrated = $(foreach task,$(1),$(if $(and $(call RATED,$(task),$(2),lora),$(call RATED,$(task),$(2),partial),$\
	$(if $(3),$(call RATED,$(task),$(2),$(3)),none)),,$(task)))
of_images_left = $(call unrated,$(1),$(MODEL_$(PRESET)),$(2))
of_texts_left = $(call unrated,$(1),$(TEXT_MODEL_$(PRESET)),$(2))
LEFT_studied = $(if $(call of_images_left,$(patsubst task=%,%,$(STUDIED)),targeted),$(TUNE_STUDIED))
LEFT_images = $(call TUNE_OTHERS,$(call of_images_left,$(IMAGES_$(PRESET)),targeted))
LEFT_texts = $(call TUNE_OTHERS,,$(call of_texts_left,$(TEXTS_$(PRESET)),targeted))
LEFT_mixtures = $(call TUNE_OTHERS,,,$(call of_images_left,$(RATED_MIXTURES_$(PRESET))),$(call of_texts_left,$(RATED_MIXTURES_$(PRESET))))

.PHONY: rates-studied rates-images rates-texts rates-mixtures
rates-images rates-texts rates-mixtures: | rates-studied
rates-studied rates-images rates-texts rates-mixtures: rates-%: | $(VENV)/.installed
	$(LEFT_$*)
	$(if $(strip $(LEFT_$*)),$(KEEP_BEST) || test $$? = 1)

# The runs of each table and figure, by what they have in common.
define AT_POINTS
$(call RUN,$(1),$(2) $(DENSE))
$(call RUN,$(1),$(2))

endef

FOR_TABLE1 = $(call AT_POINTS,table1,$(STUDIED) $(MANY))
FOR_FIG4 = $(call RUN,fig4,$(STUDIED) method.rank=$(1) method.alpha=$(1) calibration.budget=$(2))

runs-table1:
	$(FOR_TABLE1)
	$(call known,$(IMAGES),$(call AT_POINTS,table1,$(IMAGES)))

runs-table2:
	$(FOR_TABLE1)
	$(call RUN,table2,$(STUDIED))
	$(if $(filter paper,$(PRESET)),$(call RUN,table2,$(IMAGES)))

# A causal model on the CPU takes hours: CHOICES= leaves it out. It is `make causal`'s own, one seed, rates untuned.
CHOICES_cpu = $(call there,arc_easy piqa)
CHOICES ?= $(CHOICES_$(PRESET))
CAUSAL_MODELS = $(call listed,$(CAUSAL_paper))
FOR_CHOICES_cpu = $(foreach task,$(CHOICES),$(call CHOICE,$(task)))
FOR_CHOICES_paper = $(call known,$(CHOICES),$(call AT_POINTS,table3,\
	model=$(CAUSAL_MODELS) task=$(call listed,$(CHOICES)) trainer.tuned=null trainer.learning_rate=3e-4 trainer.epochs=1 \
	calibration.search=bisect model.gradient_checkpointing=true))

runs-table3:
	$(call known,$(TEXTS),$(call AT_POINTS,table3,$(TEXTS)))
	$(FOR_CHOICES_$(PRESET))

runs-table4:
	$(call RUN,table4,$(STUDIED) $(MANY) $(CONTROLS))
	$(call RUN,table4,$(STUDIED) $(MANY) $(DENSE))
	$(call RUN,table4,$(STUDIED) method=flow)
	$(call RUN,table4,$(STUDIED) $(ELEMENT))
	$(call RUN,table4,$(STUDIED) method=$(PEERS) calibration=threshold)

runs-table5: calibration-analyses
	$(FOR_TABLE1)
	$(call RUN,table5,$(STUDIED))

runs-table6:
	$(call known,$(MIXED_IMAGES),$(call AT_POINTS,table6,$(MIXED_IMAGES)))
	$(call known,$(MIXED_TEXTS),$(call AT_POINTS,table6,$(MIXED_TEXTS)))

BENCHED = results/bench/adapter.json
$(BENCHED): | $(VENV)/.installed
	$(BIN)/python scripts/bench_adapter.py

runs-methods:
	$(call RUN,methods,$(STUDIED) $(UNCALIBRATED))
	$(call RUN,methods,$(STUDIED) $(CALIBRATED) $(POINTS))
	$(call RUN,methods,$(STUDIED) $(ELEMENT) $(POINTS))

runs-table7: runs-methods | $(BENCHED)

FLOWERS = $(call RUN,fig1,$(PHOTOGRAPHS) $(1))
runs-fig1:
	$(call RUN,fig1,$(STUDIED))
	$(call RUN,fig1,$(STUDIED) method=lora$(comma)probe calibration.threshold=0.9)
	$(call known,$(PHOTOGRAPHS),$(call FLOWERS,method=partial calibration.threshold=0.7$(comma)0.8$(comma)0.9))
	$(call known,$(PHOTOGRAPHS),$(call FLOWERS,method=lora calibration.threshold=0.9))

runs-fig2: runs-table1 runs-table3

runs-fig3: runs-table1

# 13 % of rank 16: what rank times density comes to is everywhere the same, and low_rank, dense, is of rank 2.
runs-fig4:
	$(call FOR_FIG4,4,0.52)
	$(call FOR_FIG4,8,0.26)
	$(call FOR_FIG4,16,0.13)
	$(call FOR_FIG4,32,0.065)
	$(call FOR_FIG4,64,0.0325)
	$(call RUN,fig4,$(STUDIED) method=low_rank)

runs-fig5: runs-table2
	$(BIN)/python scripts/analyses.py agreement $(ANALYSES)

runs-fig6:
	$(call RUN,fig6,$(STUDIED))

# Without noise they are table1's, each seed with a calibration of its own; with noise the seeds share one.
OWN = calibration.seed=null
runs-fig7:
	$(call RUN,fig7,$(STUDIED) $(OWN))
	$(call RUN,fig7,$(STUDIED) task.label_noise=0.4)
	$(call RUN,fig7,$(STUDIED) $(FEW_$(PRESET)) task.label_noise=0$(comma)0.4)
	$(call RUN,fig7,$(STUDIED) $(OWN) method=partial seed=0 mask.seed=1$(comma)2$(comma)3$(comma)4$(comma)5$(comma)6$(comma)7)

TABLES = table1 table2 table3 table4 table5 table6 table7
FIGURES = fig1 fig2 fig3 fig4 fig5 fig6 fig7
NAMES = $(TABLES) $(FIGURES)
.PHONY: reproduce runs-methods $(NAMES:%=runs-%) $(NAMES:%=reproduce-%)
runs-methods $(NAMES:%=runs-%): | $(VENV)/.installed rates-studied
runs-table1 runs-table2 runs-fig1: | rates-images
runs-table3: | rates-texts
runs-table6: | rates-mixtures

# What a figure needs beside the records is measured where the weights are; 3 says that some have none.
MEASURED_fig3 = $(BIN)/python scripts/dynamics.py $(RESULTS) --figure fig3 || test $$? = 3
MEASURED_fig7 = $(BIN)/python scripts/dynamics.py $(RESULTS) --figure fig7 || test $$? = 3
$(NAMES:%=reproduce-%): reproduce-%: runs-%
	$(MEASURED_$*)
	$(BIN)/python scripts/reproduce.py $* $(if $(filter table%,$*),claims) --results $(RESULTS)

reproduce: $(NAMES:%=reproduce-%)
	$(BIN)/python scripts/reproduce.py claims --results $(RESULTS)

# Finished runs are skipped, so an interrupted table goes on where it was.
FIRST = $(BIN)/partial-lora train -m results_dir=results/first
FIRST_CIFAR10 = task=cifar10 trainer.epochs=1 task.data_files='{train: $(CIFAR10)/train.parquet, test: $(CIFAR10)/test.parquet}'

first: $(VENV)/.installed
	$(FIRST) experiment=first_bounds task=digits
	$(FIRST) experiment=first task=digits
	$(FIRST) experiment=first_bounds $(FIRST_CIFAR10)
	$(FIRST) experiment=first $(FIRST_CIFAR10)
	$(BIN)/partial-lora report results/first

# Methods at their defaults, as a stranger meets them; FIRST_DAY=… has options of the script.
first-day: $(VENV)/.installed
	$(BIN)/python scripts/first_day.py --data $(DATA) --out results/first_day $(FIRST_DAY)

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
# As their runs have it, whatever else is made.
digits-rate sst2-rate: override PRESET = cpu
digits-rate: $(VENV)/.installed
	$(if $(IMAGES_cpu),$(DIGITS_RATE) $(DENSE))
	$(if $(IMAGES_cpu),$(DIGITS_RATE))
	$(BIN)/python scripts/reproduce.py table1 table5 --results results/digits_rate

# Beside digits two sets of images of DATA=FOLDER, where that is there.
OTHER_IMAGES = $(call there,cifar10 signdigits)
SAME_RATE = $(BIN)/partial-lora train -m experiment=same_rate preset=cpu results_dir=results/same_rate
same-rate: $(VENV)/.installed
	$(SAME_RATE) task=digits
	$(call known,$(OTHER_IMAGES),$(SAME_RATE) task=$(call listed,$(OTHER_IMAGES)) $(OF_FILES_cpu) task.test_samples=1000)
	$(BIN)/partial-lora report results/same_rate

# Every form of mask at equal sizes (conf/experiment/forms.yaml). Plain LoRA on some modules alone has as many parameters
# as low_rank has on all of them, and needs less memory.
FORMS = methods=[lora,low_rank,random_weights,entries,ticket,partial] methods=[partial]+method.rank=auto \
	methods=[partial]+mask=units methods=[partial]+mask=groups+mask.fan_in=dense+mask.row_exponent=0 \
	methods=[partial]+mask=frozen+mask.fan_in=dense \
	methods=[partial]+mask.row_exponent=0 methods=[partial]+mask.fan_in=dense+mask.row_exponent=0 \
	methods=[entries]+mask.fan_in=kept methods=[entries]+mask.fan_in=kept+mask.row_exponent=1 \
	methods=[partial]+budgets=[0.6,0.05,0.01] methods=[partial]+method.rank=auto+budgets=[0.05,0.01]
FEWER_FORMS = methods=[lora,low_rank,random_weights,entries,partial] methods=[partial]+budgets=[0.6,0.05,0.01]
SOME_IMAGES = methods=[lora]+model.target_modules=[attn.qkv]+method.rank=8+method.alpha=8
SOME_TEXTS = methods=[lora]+model.target_modules=[query,value]+method.rank=9+method.alpha=9
FORM_TASKS = task=digits $(if $(call there,trec),task=trec+model=$(TEXT_MODEL_cpu)) \
	$(if $(call there,gtsrb),task=gtsrb+model.image_size=56+task.test_samples=1000)
spaced = $(subst +,$(empty) $(empty),$(1))
# The runs of a comparison. 1: the experiment and its results; 2: the task; 3: methods, and settings of all of them.
define COMPARED
$(BIN)/partial-lora compare experiment=$(1) results_dir=results/$(1) $(if $(FILES_AT),data_dir=$(FILES_AT)) rates=3 \
	$(if $(SEEDS),seeds=$(SEEDS)) $(if $(findstring budgets,$(3)),,budgets=[0.13,0.02]) $(call spaced,$(2) $(3)) || test $$? = 1

endef
forms: $(VENV)/.installed
	$(foreach task,$(FORM_TASKS),$(foreach form,$(FORMS) $(if $(findstring trec,$(task)),$(SOME_TEXTS),$(SOME_IMAGES)),$(call COMPARED,forms,$(task),$(form))))
	$(if $(call there,signdigits),$(foreach form,$(FEWER_FORMS),$(call COMPARED,forms,task=signdigits,$(form))))
	$(BIN)/python scripts/forms.py results/forms

# PEFT's methods beside ours (conf/experiment/race.yaml).
RACERS = low_rank,partial,entries,random_weights,dora,vera,lokr,loha,hira,pissa,rslora,loraplus,psoft,oft,unilora,fourierft,randlora,gralora,lora
RANKING = $(BIN)/python scripts/forms.py results/race --stem race --page
race: $(VENV)/.installed
	$(foreach task,$(FORM_TASKS),$(call COMPARED,race,$(task),methods=[$(RACERS)]))
	$(RANKING)

# The claims with the power to decide them (conf/experiment/decided.yaml): sets, and stages of each, in this order.
DECIDED ?= digits trec sst2 gtsrb cifar10 signdigits flowers17
STAGES ?= first which point shares
RACE_BEST ?= entries,oft
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
SUITED = $(BIN)/partial-lora train -m $(call of_decided,$(1)) $(MANY) trainer.learning_rate=1e-3 $(2) || test $$? = 1
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
RATE_gtsrb = 2e-3
AT_ITS_RATE = $(BIN)/partial-lora train -m $(call of_decided,$(1)) $(MANY) \
	trainer.learning_rate=$(or $(RATE_$(1)),auto) $(2) || test $$? = 1
define SHARES
$(call AT_ITS_RATE,$(1),method=partial calibration.search=gradient)
$(call AT_ITS_RATE,$(1),method=partial calibration.shrink=0$(comma)0.5$(comma)2)
$(call AT_ITS_RATE,$(1),method=uniform calibration=fixed)
$(call AT_ITS_RATE,$(1),method=shuffled)
$(call AT_ITS_RATE,$(1),method=partial calibration.levels=0.01 calibration.max_sparsity=0.99)

endef
STAGE_shares = $(if $(filter digits trec gtsrb,$(1)),$(SHARES))
decided: $(VENV)/.installed
	$(foreach task,$(call there,$(DECIDED)),$(foreach stage,$(STAGES),$(call STAGE_$(stage),$(task))))
	$(BIN)/python scripts/decided.py results/decided

SST2_RATE = $(BIN)/partial-lora train -m experiment=sst2_rate preset=cpu results_dir=results/sst2_rate $(call of_texts,sst2)
sst2-rate: $(VENV)/.installed
	$(SST2_RATE)
	$(SST2_RATE) method=lora calibration=threshold trainer.tuned=null trainer.learning_rate=1e-3
	$(BIN)/partial-lora report results/sst2_rate

PACKED = $(patsubst results/%/runs.parquet,%,$(wildcard results/*/runs.parquet))
define REPORTED
$(if $(filter race,$(1)),$(RANKING),$(BIN)/partial-lora report results/$(1))

endef
reports: $(VENV)/.installed
	$(foreach study,$(PACKED),$(call REPORTED,$(study)))

# The three figures of results/figures, and the pages whose numbers are filled in from the tables.
figures pages: $(VENV)/.installed
	$(BIN)/python -m partial_lora.report.evidence $@

coverage: $(VENV)/.installed
	$(BIN)/python scripts/interval_coverage.py

power: $(VENV)/.installed
	$(BIN)/python scripts/power.py

REACH = $(BIN)/python scripts/reach.py $(if $(FILES_AT),data_dir=$(FILES_AT))
reach: $(VENV)/.installed
	$(REACH) task=digits
	$(if $(call there,gtsrb),$(REACH) task=gtsrb model.image_size=56)
	$(if $(call there,trec),$(REACH) task=trec model=$(TEXT_MODEL_cpu))
	$(if $(call there,cifar10),$(REACH) task=cifar10 model.image_size=56)

models: $(VENV)/.installed
	$(BIN)/python scripts/model_table.py

# BENCH=--profile: where the time of a step goes, in place of the benchmarks.
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
