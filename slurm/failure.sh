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
  local log where=$REASON text=''
  if [[ -n $FAILED_TASK ]]; then
    local unit=rank
    [[ $LAUNCHER == torchrun ]] && unit='node number'
    where="$unit $FAILED_TASK on $FAILED_HOST: $REASON"
    log=${TASK_LOG/\%3t/$(printf '%03d' "$FAILED_TASK")}
    # What all ranks have found, rank 0 tells for all.
    [[ -s $log ]] || log=${TASK_LOG/\%3t/000}
    text=$(grep -v '^slurmstepd' "$log" | grep -i 'error' | tail -n 1)
    printf -- '--- %s, end of %s ---\n' "$unit $FAILED_TASK on $FAILED_HOST" "$log"
    tail -n 20 "$log"
    printf -- '---\n'
  fi
  printf 'slurm: %s failed first at %s%s\n' "$FAILED_NAME" "$where" "${text:+; $text}" >&2
}
