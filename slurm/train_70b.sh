#!/bin/bash
#SBATCH --job-name=nested-reft-70b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@900
# Llama-3.1-70B-Instruct: sbatch slurm/train_70b.sh [CONFIG.yaml] [--dry-run] [SECTION.FIELD=VALUE ...]
# From the project's root. One task for each GPU; SIGUSR1 comes before the time limit, and the run
# saves and comes back. What else can be said to it: slurm/README.md.

cd "${SLURM_SUBMIT_DIR:-.}" && source slurm/lib.sh || exit 2
train_job examples/llama3.1_70b/config.yaml models/Llama-3.1-70B-Instruct "$@"
