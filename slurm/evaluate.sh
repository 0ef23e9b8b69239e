#!/bin/bash
#SBATCH --job-name=nested-reft-evaluate
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=02:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# Accuracy: sbatch slurm/evaluate.sh CONFIG.yaml [--checkpoint DIR] [--skip-layers LIST] [...]
# Arguments are those of `nested-reft evaluate`. Without --checkpoint and --hf it is the
# configuration's model. Submitted again, it goes on where a killed one was.

cd "${SLURM_SUBMIT_DIR:-.}" && source slurm/lib.sh || exit 2
is_config "${1-}" || fail "expected CONFIG.yaml first: sbatch slurm/evaluate.sh CONFIG.yaml"
read_arguments "$@"
begin_job
other_job evaluate "$CONFIG" "${OVERRIDES[@]}" "${ARGUMENTS[@]}"
