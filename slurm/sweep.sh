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
# The runs of a study (docs/scaling_studies.md), one a task; `tools/scaling_study.py submit` does it:
#   sbatch --array=... slurm/sweep.sh --study FILE [--drop-checkpoints] [SECTION.FIELD=VALUE ...]
# Each correction has its own usual threshold, unless an argument says algorithm.rollout_is_threshold.

cd "${SLURM_SUBMIT_DIR:-.}" && source slurm/lib.sh || exit 2

# study_task INDEX FILE [--drop-checkpoints] [ARGUMENT ...]: a line of FILE has a run's directory, its
# configuration and its options, between tabs. Ends the job.
study_task() {
  local index=$1 file=$2 drop=0 lines=() words=() began=$EPOCHSECONDS
  shift 2
  [[ ${1-} == --drop-checkpoints ]] && drop=1 && shift
  [[ -f $file ]] || fail "--study $file: not found; tools/scaling_study.py submit writes it"
  mapfile -t lines <"$file"
  ((index < ${#lines[@]})) || fail "--array: task $index, but $file has ${#lines[@]} runs"
  IFS=$'\t' read -r -a words <<<"${lines[index]}"
  say "task $index of $file: ${words[0]##*/}"
  train_job "${words[1]}" '' "${words[@]:2}" "$@"
  ((drop)) && rm -rf "${words[0]}/checkpoints"
  printf '{"started": %s, "exit_code": 0, "seconds": %s}\n' "$began" "$((EPOCHSECONDS - began))" \
    >"${words[0]}/study.json"
  exit 0
}

read -r -a ratios <<<"${SKIP_RATIOS:-0 0.1 0.2 0.3}"
read -r -a corrections <<<"${CORRECTIONS:-practical base retrace}"
read -r -a seeds <<<"${SEEDS:-0 1 2}"
index=${SLURM_ARRAY_TASK_ID-}
[[ -n $index ]] || fail "this is no job array: sbatch slurm/sweep.sh, without --array=none"
[[ ${1-} == --study ]] && study_task "$index" "${@:2}"
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
