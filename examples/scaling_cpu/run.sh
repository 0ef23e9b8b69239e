#!/usr/bin/env bash
# The task, then every run of the study that is not finished, then the report.
# Usage: examples/scaling_cpu/run.sh [OPTION OF `scaling_study.py run` ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$here/../..
python=${PYTHON:-python}

# Its text does not matter here: completions have a fixed length and are about nothing.
[[ -e runs/scaling_cpu/task/tokenizer.model ]] ||
  "$python" "$root/examples/cpu_demo/make_task.py" --output runs/scaling_cpu/task
"$python" "$root/tools/scaling_study.py" run "$here/study.yaml" "$@"
"$python" "$root/tools/scaling_study.py" report "$here/study.yaml"
