#!/bin/sh
# Run a sweep on a Slurm cluster: every combination of the values below becomes a job of its own.
#
#     pip install '.[sweeps]'
#     sh examples/slurm_sweep.sh                                              # here: the jobs are processes
#     LAUNCHER=submitit_slurm MODEL=vit_b16 TASK=cifar10 sh examples/slurm_sweep.sh \
#         hydra.launcher.partition=gpu hydra.launcher.gpus_per_node=1 trainer.max_steps=null
#
# Prints: a table of the four runs (their values, how they ended, seconds, test score), then the means over seeds.
# Takes: about 55 s of CPU time; the four runs go side by side.
set -eu

LAUNCHER=${LAUNCHER:-submitit_local}  # submitit_slurm sends the jobs to your cluster
MODEL=${MODEL:-tiny_vit}              # tiny and random; vit_s14 is real, and vit_b16 comes from the hub
TASK=${TASK:-digits}

# The folder of the results has to be on a disk that all machines share. The same command again starts what is missing.
partial-lora train -m "model=$MODEL" "task=$TASK" calibration=fixed results_dir=out/slurm_sweep \
    "hydra/launcher=$LAUNCHER" hydra.launcher.timeout_min=240 \
    trainer.max_steps=60 trainer.learning_rate=0.02 method=partial,lora seed=0,1 "$@"

partial-lora report out/slurm_sweep

# A job array without a launcher: scripts/slurm_sweep.sh
