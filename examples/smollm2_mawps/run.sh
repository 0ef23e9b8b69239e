#!/usr/bin/env bash
# A pretrained model, real word problems, and back to Hugging Face: README.md says what to expect.
# Usage: run.sh [MAWPS.jsonl]    JSON lines with `input` and `target`; or name the file in MAWPS_FILE
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
data=$(realpath -m "${1:-${MAWPS_FILE:-$here/../../../shared/data/mawps/mawps_singleop.jsonl}}")
cd "$here/../.."
test -f "$data" || { echo "run.sh: $data is not there; give the path of a MAWPS file" >&2; exit 2; }

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export PYTHONWARNINGS=${PYTHONWARNINGS:-ignore} # libraries' remarks about one another
command -v nested-reft >/dev/null || { make setup && PATH="$PWD/.venv/bin:$PATH"; }
python=$(command -v python || command -v python3)

runs=runs/smollm2_mawps
"$python" "$here/get_model.py" --output $runs/model --cache $runs/cache
"$python" "$here/split.py" "$data" --output $runs
nested-reft convert hf-to-mcore --hf $runs/model --output $runs/converted --force
"$python" "$here/check.py" before "$here/config.yaml" --hf $runs/model
rm -rf $runs/warm $runs/nested # start anew: a second run would find the first one finished
nested-reft sft "$here/config.yaml" run_dir=$runs/warm
nested-reft convert mcore-to-hf --checkpoint $runs/warm/checkpoints --output $runs/warm/hf
nested-reft train "$here/config.yaml" model.checkpoint=$runs/warm/checkpoints
"$python" "$here/check.py" after "$here/config.yaml" --hf $runs/warm/hf
"$python" "$here/figures.py" $runs/nested
echo "next: nested-reft generate --hf $runs/nested/hf --prompts FILE.jsonl --output OUT.jsonl"
