#!/bin/bash
# Three thresholds × three seeds, a run for each task of a Slurm array; all of them share one calibration.
#     sbatch scripts/slurm_sweep.sh [KEY=VALUE …]       then: partial-lora report
#SBATCH --job-name=partial-lora
#SBATCH --array=0-8
#SBATCH --gres=gpu:1
#SBATCH --cpus-per-task=8
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
thresholds=(0.7 0.8 0.9)
threshold=${thresholds[$((SLURM_ARRAY_TASK_ID / 3))]}
seed=$((SLURM_ARRAY_TASK_ID % 3))

srun partial-lora train model=vit_b16 task=cifar100 calibration.threshold="$threshold" seed="$seed" "$@"
