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
  ((code > 128 && code != 138 && code != 143)) && JOB_CODE=4
  hear_ranks
  return 0
}

# hear_ranks: what the ranks say themselves. They watch over each other and leave together, so srun's
# order says little. Sets SHARED, what all of them have found; or VERDICT, what was wrong with one,
# RANK, HOST and, under torchrun, which turns all codes into 1, JOB_CODE.
hear_ranks() {
  local first=${TASK_LOG/\%3t/000} all=${TASK_LOG/\%3t/*} named='\[rank [0-9]+ on [^]]+\] .*' words
  VERDICT='' SHARED='' RANK='' HOST=''
  # Where rank 0 is the one that was lost, the others tell.
  # shellcheck disable=SC2086
  VERDICT=$(grep -hoE "$named" "$first" 2>/dev/null || grep -hoE "$named" $all 2>/dev/null)
  VERDICT=${VERDICT##*$'\n'}
  if [[ -n $VERDICT ]]; then
    read -r -a words <<<"${VERDICT//]/ }"
    RANK=${words[1]} HOST=${words[3]}
    [[ $LAUNCHER == torchrun && $VERDICT == *' was lost: '* ]] && JOB_CODE=4
  else
    SHARED=$(grep -hoE '(^|\]:)(error|preflight): .*' "$first" 2>/dev/null | tail -n 1)
    SHARED=${SHARED#]:}
  fi
}

# Prints the failure that judge has found: the end of the rank's log, and one line, the last of all.
explain() {
  local log=${TASK_LOG/\%3t/000} unit=rank number=$FAILED_TASK where=$REASON text=''
  [[ $LAUNCHER == torchrun ]] && unit='node number'
  if [[ -n $SHARED ]]; then
    show_end 'rank 0' "$log"
    printf 'slurm: %s failed: %s\n' "$FAILED_NAME" "$SHARED" >&2
    return
  fi
  if [[ -n $VERDICT ]]; then
    [[ $unit == rank && $RANK == "$number" ]] || REASON="job ended with code $JOB_CODE"
    unit=rank number=$RANK FAILED_HOST=$HOST text=$VERDICT
    FAILED_TASK=$RANK
    [[ $LAUNCHER == torchrun ]] && FAILED_TASK=$((RANK / TASKS_PER_NODE))
  fi
  if [[ -n $number ]]; then
    where="$unit $number on $FAILED_HOST: $REASON"
    [[ -s ${TASK_LOG/\%3t/$(printf '%03d' "$FAILED_TASK")} ]] &&
      log=${TASK_LOG/\%3t/$(printf '%03d' "$FAILED_TASK")}
    [[ -n $text ]] || text=$(grep -v '^slurmstepd' "$log" | grep -i 'error' | tail -n 1)
    show_end "$unit $number on $FAILED_HOST" "$log"
  fi
  can_write "$LOGS" || text+="; $LOGS cannot be written: is the disk full?"
  printf 'slurm: %s failed first at %s%s\n' "$FAILED_NAME" "$where" "${text:+; $text}" >&2
}

# show_end WHOSE LOG
show_end() {
  printf -- '--- %s, end of %s ---\n' "$1" "$2"
  tail -n 20 "$2"
  printf -- '---\n'
}
