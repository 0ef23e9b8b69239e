#!/bin/bash
#SBATCH --job-name=nested-reft-convert
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=2
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Hugging Face to checkpoint or back; no GPU needed, the tasks share the work:
#   sbatch slurm/convert.sh hf-to-mcore --hf models/base --output checkpoints/base
#   sbatch slurm/convert.sh mcore-to-hf --checkpoint runs/first/checkpoints --output models/tuned
# Arguments are those of `nested-reft convert`. With --verify: --ntasks-per-node = tensor x pipeline.

cd "${SLURM_SUBMIT_DIR:-.}" && source slurm/lib.sh || exit 2
begin_job
other_job convert "$@"
