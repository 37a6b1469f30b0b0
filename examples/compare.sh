#!/bin/sh
# Ask which method is best at one size: each gets a search for its learning rate, and a verdict ends it.
#
#     sh examples/compare.sh
#     MODEL=vit_s14 METHODS=lora,entries,dora,lokr sh examples/compare.sh trainer.max_steps=null seeds=null rates=3
#
# Prints: the size of every method and what it takes, the ranking, the verdict, and the path of the page.
# Takes: about 20 s of CPU time.
set -eu

MODEL=${MODEL:-tiny_vit}  # tiny and random; vit_s14 is real, and vit_b16 comes from the hub
METHODS=${METHODS:-lora,entries}

# Two rates and one seed are the least that there is, to be quick. The defaults are three rates, and seeds where they decide.
# budgets are shares of the parameters of dense LoRA; with [0.13,0.02] each method is searched at both sizes.
partial-lora compare "model=$MODEL" task=digits "methods=[$METHODS]" "budgets=[0.13]" rates=2 seeds=1 \
    trainer.max_steps=60 results_dir=out/compare "$@"

# The ranking as a table for other programs:
cat out/compare/compare.csv
