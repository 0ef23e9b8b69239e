# From srun's messages, the failure to blame: its exit code, task, host and reason, between tabs.
# A signal counts as 128 and its number, a lost node as 4 without a task.

function consider(importance, code, task, host, reason) {
  if (best != "" && importance >= best) return
  best = importance
  found = code "\t" task "\t" host "\t" reason
}

function code_of(reason, words) {
  if (reason ~ /^Exited with exit code/) { split(reason, words, " "); return words[5] }
  if (reason ~ /^User defined signal 1/) return 138
  if (reason ~ /^(Killed|Out Of Memory)/) return 137
  if (reason ~ /^Segmentation fault/) return 139
  if (reason ~ /^Aborted/) return 134
  return 143
}

/^srun: .*(Terminating StepId|forcing job termination|Job step aborted)/ { forced = 1 }

/^srun: error: Node failure on/ { consider(forced ? 3 : 0, 4, "", "", substr($0, 14)) }

/^srun: error: [^ ]+: tasks? [0-9,-]+: / {
  host = substr($3, 1, length($3) - 1)
  task = $5
  sub(/[,:-].*/, "", task)
  reason = $0
  sub(/^srun: error: [^ ]+: tasks? [0-9,-]+: /, "", reason)
  code = code_of(reason)
  consequence = code == 4 || code == 75
  consider(forced ? 3 : consequence ? 2 : 1, code, task, host, reason)
}

END { if (best != "") print found }
