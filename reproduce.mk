# make tune                          learning rates of every method on digits (results/tune, results/tuning.json)
# make reproduce-tune                the same, and on the other tasks those of lora, partial and targeted
#
# PRESET=cpu     models out of PyPI wheels, digits always, and the tasks of DATA=FOLDER where that is there
# PRESET=paper   the paper's models and sets from the hub, on GPUs
# Finished runs are skipped and interrupted ones go on, whoever asked for them first. conf/experiment/tune.yaml, table1.yaml
# and so on say what each costs and what it is to show.

PRESET ?= cpu
TRAIN = $(BIN)/partial-lora train -m
empty =
listed = $(subst $(empty) $(empty),$(comma),$(strip $(1)))

# A preset's models and tasks. Texts have twice the rows of images; photographs of flowers need more pixels than digits.
FILES_AT = $(if $(wildcard $(DATA)),$(DATA))
IMAGES_cpu = $(if $(FILES_AT),cifar10 signdigits gtsrb)
PHOTOGRAPHS_cpu = $(if $(FILES_AT),flowers17)
TEXTS_cpu = $(if $(FILES_AT),sst2 trec qnli mrpc)
IMAGES_paper = cifar10 cifar100 caltech101 dtd eurosat flowers102 oxford_pets svhn
TEXTS_paper = sst2 cola mnli mrpc qnli qqp rte stsb
OF_PHOTOGRAPHS = model.image_size=98
OF_TEXTS_cpu = model=minilm_l6 task.train_samples=1200 task.test_samples=1000
OF_TEXTS_paper = model=deberta_v3_base

IMAGES = $(IMAGES_$(PRESET))
PHOTOGRAPHS = $(PHOTOGRAPHS_$(PRESET))
TEXTS = $(TEXTS_$(PRESET))
OF_TEXTS = $(OF_TEXTS_$(PRESET))
OF_FILES = $(if $(filter cpu,$(PRESET)),data_dir=$(FILES_AT))

# Five rates a factor 3 apart for every method on digits; of a search some may fail, where a rate is too large.
CALIBRATED = method=partial,targeted,uniform,shuffled,inverted,low_rank,random_weights,flow calibration=threshold,budget
ELEMENT = method=partial mask=element calibration=threshold,budget
SEARCHED_cpu = results/tune
SEARCHED_paper = results/paper/tune
SEARCHED = $(SEARCHED_$(PRESET))
TUNED_cpu = results/tuning.json
TUNED_paper = results/paper/tuning.json
TUNED = $(TUNED_$(PRESET))
TUNE = $(TRAIN) experiment=tune preset=$(PRESET) results_dir=$(SEARCHED)
HIGHER = trainer.learning_rate=1e-3,3e-3,1e-2,3e-2,1e-1
LOWER = trainer.learning_rate=1e-5,3e-5,1e-4,3e-4,1e-3
KEEP_BEST = $(BIN)/python scripts/tune.py $(SEARCHED) --out $(TUNED)

define TUNE_ALL
-$(TUNE) $(1) method=lora,dora,adalora,lorafa
-$(TUNE) $(1) method=vera,probe $(HIGHER)
-$(TUNE) $(1) method=full $(LOWER)
-$(TUNE) $(1) $(CALIBRATED) $(HIGHER)
-$(TUNE) $(1) $(ELEMENT) $(HIGHER)

endef

# On other tasks what table1 to table3 and table6 have, at four rates.
define TUNE_SOME
-$(TUNE) $(1) method=lora trainer.learning_rate=3e-4,1e-3,3e-3,1e-2
-$(TUNE) $(1) method=partial,targeted calibration=threshold,budget trainer.learning_rate=1e-3,3e-3,1e-2,3e-2

endef

.PHONY: tune reproduce-tune
tune: $(VENV)/.installed
	$(call TUNE_ALL,task=digits)
	$(KEEP_BEST)

reproduce-tune: $(VENV)/.installed
	$(if $(filter cpu,$(PRESET)),$(call TUNE_ALL,task=digits))
	$(if $(IMAGES),$(call TUNE_SOME,task=$(call listed,$(IMAGES)) $(OF_FILES)))
	$(if $(PHOTOGRAPHS),$(call TUNE_SOME,task=$(call listed,$(PHOTOGRAPHS)) $(OF_FILES) $(OF_PHOTOGRAPHS)))
	$(if $(TEXTS),$(call TUNE_SOME,task=$(call listed,$(TEXTS)) $(OF_FILES) $(OF_TEXTS)))
	$(KEEP_BEST)
