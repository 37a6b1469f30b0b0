#!/bin/bash
# Llama 3.1 8B in parts (FSDP2) over 2 nodes of 8 GPUs, on gsm8k. Both nodes have to see the results directory.
#     sbatch scripts/slurm_fsdp_llama3_1_8b.sh [KEY=VALUE …]
#SBATCH --job-name=partial-lora-llama3_1_8b
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --signal=TERM@300
FIRST=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export FIRST

# Every node runs the same command, and knows by its number which of the machines it is.
srun --kill-on-bad-exit=1 bash -c 'exec partial-lora train model=llama3_1_8b task=gsm8k trainer.strategy=fsdp \
    trainer.num_machines=2 trainer.machine_rank="$SLURM_NODEID" trainer.main_process_ip="$FIRST" \
    trainer.num_processes=16 trainer.batch_size=64 trainer.gradient_accumulation_steps=2 "$@"' partial-lora "$@"
