#!/usr/bin/env bash
# The task, one warm-up, then every run of accuracy.yaml that is not finished, then the report.
# Usage: examples/scaling_cpu/accuracy.sh [OPTION OF `scaling_study.py run` ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$here/../..
python=${PYTHON:-python}
out=runs/scaling_cpu
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

[[ -e $out/task/tokenizer.model ]] ||
  "$python" "$root/examples/cpu_demo/make_task.py" --output "$out/task"
[[ -e $out/sft/checkpoints/latest ]] ||
  "$python" -m nested_reft_mcore sft "$here/../cpu_demo/config.yaml" run_dir="$out/sft" \
    data.tokenizer_path="$out/task/tokenizer.model" data.train_path="$out/task/sft.jsonl" \
    data.eval_path="$out/task/eval.jsonl"
"$python" "$root/tools/scaling_study.py" run "$here/accuracy.yaml" "$@"
"$python" "$root/tools/scaling_study.py" report "$here/accuracy.yaml"
