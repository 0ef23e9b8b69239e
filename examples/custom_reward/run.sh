#!/usr/bin/env bash
# The demo's warm-up, then five steps with a weighted sum of rewards, three of them from rewards.py.
# Usage: examples/custom_reward/run.sh [OUTPUT_DIRECTORY]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
out=${1:-runs/custom_reward}
python=${PYTHON:-python}
config=$here/../cpu_demo/config.yaml
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
rm -rf "$out/sft" "$out/train"

"$python" "$here/../cpu_demo/make_task.py" --output "$out/task"
task=(data.tokenizer_path="$out/task/tokenizer.model" data.eval_path="$out/task/eval.jsonl")
"$python" -m nested_reft_mcore sft "$config" "${task[@]}" \
  data.train_path="$out/task/sft.jsonl" run_dir="$out/sft" sft.num_steps=200
"$python" -m nested_reft_mcore train "$config" "${task[@]}" \
  data.train_path="$out/task/train.jsonl" --checkpoint "$out/sft/checkpoints" \
  run_dir="$out/train" train.num_steps=5 evaluation.interval=0 reward.name=null \
  "reward.functions=[{name: numeric_match}, \
    {name: '$here/rewards.py:shows_work', weight: 0.2, options: {mark: '>'}}, \
    {name: '$here/rewards.py:agrees', weight: 0.1}, \
    {name: '$here/rewards.py:is_rare', weight: 0}]"

"$python" - "$out/train/metrics.jsonl" <<'PYTHON'
import json, sys
for line in map(json.loads, open(sys.argv[1])):
    print(line["step"], {k: round(v, 3) for k, v in line.items() if k.startswith("reward/")})
PYTHON
