#!/bin/bash
#SBATCH --job-name=nested-reft-sweep
#SBATCH --array=0-35%4
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%A_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=USR1@300
# Every skip ratio with every correction and seed, a run each, four at a time:
#   sbatch slurm/sweep.sh [CONFIG.yaml] [SECTION.FIELD=VALUE ...]
#   SKIP_RATIOS="0.1 0.2" CORRECTIONS=retrace SEEDS="0 1" sbatch --array=0-3 slurm/sweep.sh
# Runs are in SWEEP_DIR (default: runs/sweep_JOB). Whoever finishes rewrites SWEEP_DIR/results.csv,
# so the last one has them all; by hand: python tools/collect_sweep.py SWEEP_DIR
# Each correction has its own usual threshold, unless an argument says algorithm.rollout_is_threshold.

cd "${SLURM_SUBMIT_DIR:-.}" && source slurm/lib.sh || exit 2
read -r -a ratios <<<"${SKIP_RATIOS:-0 0.1 0.2 0.3}"
read -r -a corrections <<<"${CORRECTIONS:-practical base retrace}"
read -r -a seeds <<<"${SEEDS:-0 1 2}"
index=${SLURM_ARRAY_TASK_ID-}
[[ -n $index ]] || fail "this is no job array: sbatch slurm/sweep.sh, without --array=none"
size=$((${#ratios[@]} * ${#corrections[@]} * ${#seeds[@]}))
((index < size)) || fail "--array: task $index, but there are $size combinations: --array=0-$((size - 1))"
((SLURM_ARRAY_TASK_COUNT == size)) || say "only $SLURM_ARRAY_TASK_COUNT of $size combinations"

config=()
is_config "${1-}" && config=("$1") && shift
seed=${seeds[index % ${#seeds[@]}]}
correction=${corrections[index / ${#seeds[@]} % ${#corrections[@]}]}
ratio=${ratios[index / ${#seeds[@]} / ${#corrections[@]}]}
sweep=${SWEEP_DIR:-runs/sweep_$SLURM_ARRAY_JOB_ID}
train_job examples/qwen2.5_math_1.5b/config.yaml models/Qwen2.5-Math-1.5B-Instruct \
  "${config[@]}" algorithm.rollout_is_threshold=null "$@" \
  nested.skip_ratio="$ratio" nested.num_skipped=null \
  algorithm.rollout_is="$correction" seed="$seed" \
  run_dir="$sweep/skip_$ratio.$correction.seed_$seed"
collect_runs "$sweep"
