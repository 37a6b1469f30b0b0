#!/bin/sh
# Let Optuna look for the learning rate and the rank: it goes by the validation score, never by the test score.
#
#     pip install '.[sweeps]'
#     sh examples/optuna_sweep.sh
#     MODEL=vit_s14 TRIALS=20 sh examples/optuna_sweep.sh trainer.max_steps=null
#
# Prints: a table of the trials (their values, how they ended, seconds, test score), and the best one on validation.
# Takes: about 40 s of CPU time.
set -eu

MODEL=${MODEL:-tiny_vit}  # tiny and random; vit_s14 is real, and vit_b16 comes from the hub
TRIALS=${TRIALS:-4}

# The sampler has a seed, so that the same command asks for the same trials again, and skips those that are finished.
partial-lora train -m "model=$MODEL" task=digits calibration=fixed results_dir=out/optuna_sweep trainer.max_steps=60 \
    hydra/sweeper=optuna hydra.sweeper.direction=maximize hydra.sweeper.n_jobs=1 \
    "hydra.sweeper.n_trials=$TRIALS" hydra.sweeper.sampler.seed=0 \
    'trainer.learning_rate=tag(log,interval(1e-4,1e-1))' method.rank=4,8,16 "$@"

# The best trial is also in out/optuna_sweep/sweep/optimization_results.yaml
