#!/usr/bin/env bash
# Warm-up, then on-policy and nested reinforcement from the same start; ends with a table.
# Usage: examples/cpu_demo/run.sh [OUTPUT_DIRECTORY]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-runs/cpu_demo}
python=${PYTHON:-python}
config=$here/config.yaml
# Two processes on two cores: threads that wait for each other must not spin.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
rm -rf "$out/sft" "$out/on_policy" "$out/nested"

"$python" "$here/make_task.py" --output "$out/task"
task=(data.tokenizer_path="$out/task/tokenizer.model" data.eval_path="$out/task/eval.jsonl")

echo; echo "== 1. Supervised warm-up"
"$python" -m nested_reft_mcore sft "$config" "${task[@]}" \
  data.train_path="$out/task/sft.jsonl" run_dir="$out/sft"

start=("${task[@]}" data.train_path="$out/task/train.jsonl"
  --checkpoint "$out/sft/checkpoints")
echo; echo "== 2. Reinforcement, on-policy: rollouts at full depth"
"$python" -m nested_reft_mcore train "$config" "${start[@]}" \
  run_dir="$out/on_policy" nested.num_skipped=0
echo; echo "== 3. Reinforcement, nested: rollouts skip 2 of 12 layers, another 2 in each step"
"$python" -m nested_reft_mcore train "$config" "${start[@]}" run_dir="$out/nested"

echo
"$python" "$here/report.py" "$out"
"$python" -m nested_reft_mcore report "$out/nested" "$out/on_policy" --output "$out/report.html"
