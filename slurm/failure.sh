# shellcheck shell=bash disable=SC2034,SC2153
# Which rank failed first, from what srun says. Sourced by lib.sh.

# judge NAME: reads why run_ranks NAME failed. Sets FAILED_TASK, FAILED_HOST, REASON and JOB_CODE.
#
# srun's own code is the highest of all tasks, and 137 as soon as it has ended one by force. What
# counts is the first failure with a cause of its own: not 4 (another process was lost), which
# follows from it, and not what srun has killed after that.
judge() {
  local found code
  FAILED_NAME=$1
  found=$(awk -f "$PROJECT/slurm/first_failure.awk" "$SRUN_LOG")
  IFS=$'\t' read -r code FAILED_TASK FAILED_HOST REASON <<<"$found"
  if [[ -z $code ]]; then
    FAILED_TASK='' FAILED_HOST='' REASON="srun left with $CODE"
    code=$CODE
  fi
  JOB_CODE=$code
  # A process that something killed, or a node that went down, is a lost one.
  ((code > 128 && code != 138)) && JOB_CODE=4
  return 0
}

# Prints the failure that judge has found: the end of the rank's log, and one line, the last of all.
explain() {
  local log first=${TASK_LOG/\%3t/000} unit=rank where=$REASON text=''
  [[ $LAUNCHER == torchrun ]] && unit='node number'
  hear_verdict "$first"
  if [[ -n $FAILED_TASK ]]; then
    where="$unit $FAILED_TASK on $FAILED_HOST: $REASON"
    log=${TASK_LOG/\%3t/$(printf '%03d' "$FAILED_TASK")}
    # What all ranks have found, rank 0 tells for all.
    [[ -s $log ]] || log=$first
    text=$(grep -v '^slurmstepd' "$log" | grep -i 'error' | tail -n 1)
    [[ -z $VERDICT ]] || text=$VERDICT
    printf -- '--- %s, end of %s ---\n' "$unit $FAILED_TASK on $FAILED_HOST" "$log"
    tail -n 20 "$log"
    printf -- '---\n'
  fi
  printf 'slurm: %s failed first at %s%s\n' "$FAILED_NAME" "$where" "${text:+; $text}" >&2
}

# hear_verdict LOG: the ranks watch over each other and leave together, so srun's order says little.
# Where rank 0 has told who was first, that is the one to blame. Sets VERDICT.
hear_verdict() {
  local task
  VERDICT=''
  [[ $LAUNCHER == srun && -f $1 ]] || return 0
  VERDICT=$(grep -E '^\[rank [0-9]+ on [^]]+\] ' "$1" | tail -n 1)
  task=${VERDICT#\[rank }
  task=${task%% *}
  [[ -n $task && $task != "$FAILED_TASK" ]] || return 0
  FAILED_TASK=$task
  FAILED_HOST=$(host_of "$task")
  REASON="job ended with code $JOB_CODE"
}

# host_of TASK: the node of a task; srun fills one node after the other.
host_of() {
  scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n "$(($1 / TASKS_PER_NODE + 1))p"
}
