# shellcheck shell=bash
# Whether a job comes back, and how often. Sourced by lib.sh.

# end_training NAME: what follows from the end of run_ranks NAME. Never returns.
end_training() {
  local why=''
  REQUEUE=0
  JOB_CODE=75
  ((CODE == 0)) || judge "$1"
  if [[ -f $RUN_DIR/requeue && $JOB_CODE == 4 ]]; then
    # With checkpoint.requeue_on_lost_peer.
    why="lost a process, saved at $(<"$RUN_DIR/requeue")"
  elif [[ -f $RUN_DIR/requeue ]]; then
    # Whatever srun makes of the ranks' code: everything is saved.
    JOB_CODE=75
    why="asked to stop, saved at $(<"$RUN_DIR/requeue")"
  else
    case $JOB_CODE in
      75 | 138 | 143)
        JOB_CODE=75
        why='asked to stop before there was anything to save'
        ;;
      *) [[ " $REQUEUE_ON " == *" $JOB_CODE "* ]] && why="exit code $JOB_CODE, one of REQUEUE_ON" ;;
    esac
  fi
  [[ -n $why ]] && decide_requeue "$why"
  ((JOB_CODE == 75)) || explain
  leave_job
}

# A stop came before the ranks began: nothing is to be saved, and the job comes back.
stop_at_start() {
  JOB_CODE=75 REQUEUE=0
  if is_running 'asked to stop before the run began'; then
    say 'asked to stop before the run began; requeued'
    REQUEUE=1
  fi
  leave_job
}

# Never returns.
leave_job() {
  if ((REQUEUE)); then
    # Slurm may have been faster. Else it ends this script within the next moments.
    scontrol requeue "$(own_job)" || say "not requeued: submit the job again, and it goes on"
  fi
  exit "$JOB_CODE"
}

# is_running WHY: whether the job may still be requeued; says so if not.
is_running() {
  local state
  state=$(scontrol --oneliner show job "$(own_job)" | grep -o 'JobState=[A-Z_]*')
  [[ $state == JobState=RUNNING ]] && return
  # Preempted without notice: Slurm has requeued it. Cancelled: nobody wants it back.
  say "$1; not requeued here, for Slurm has ended the job ($state)"
  return 1
}

# decide_requeue WHY: counts, and sets REQUEUE unless it would do harm or lead nowhere.
decide_requeue() {
  local step idle
  is_running "$1" || return 0
  step=$(last_step)
  idle=$(count_idle_restarts "$step" "${SLURM_RESTART_COUNT:-0}")
  if ((idle >= MAX_IDLE_RESTARTS)); then
    say "$1; not requeued: $idle restarts have brought it no further than step $step"
  else
    say "$1; requeued ($idle restarts without progress, $MAX_IDLE_RESTARTS at most)"
    REQUEUE=1
  fi
}

# A restart that Slurm has made by itself (a lost node, preemption without notice) counts as well.
note_start() {
  local job former idle count=-1 step now=${SLURM_RESTART_COUNT:-0}
  ((now)) || return 0
  [[ -f $RUN_DIR/restarts ]] && read -r job former idle count <"$RUN_DIR/restarts"
  [[ ${job-} == "$SLURM_JOB_ID" ]] && ((count == now - 1)) && return 0
  step=$(last_step)
  idle=$(count_idle_restarts "$step" "$((now - 1))")
  ((idle < MAX_IDLE_RESTARTS)) && return 0
  say "not started: $idle restarts have brought it no further than step $step"
  exit 4
}

# The step that a restart would go on from.
last_step() {
  local file text step=0
  for file in "$RUN_DIR/requeue" "$RUN_DIR/checkpoints/latest"; do
    # `step 12`, `step_00000012`
    text=$(cat "$file" 2>/dev/null) || continue
    text=${text#step?}
    [[ $text =~ ^[0-9]+$ ]] && ((10#$text > step)) && step=$((10#$text))
  done
  printf '%d\n' "$step"
}

# count_idle_restarts STEP COUNT: how many restarts of this job, until the one of that number, have
# ended at the step that they began at.
count_idle_restarts() {
  local file=$RUN_DIR/restarts job='' former=0 idle=0 count
  [[ -f $file ]] && read -r job former idle count <"$file"
  if [[ $job != "$SLURM_JOB_ID" ]]; then
    idle=0
  elif (($1 > former)); then
    idle=0
  else
    idle=$((idle + 1))
  fi
  printf '%s %d %d %d\n' "$SLURM_JOB_ID" "$1" "$idle" "$2" >"$file"
  printf '%d\n' "$idle"
}

# This job for scontrol, which takes the number of one task of an array for the whole array.
own_job() {
  if [[ -n ${SLURM_ARRAY_JOB_ID-} ]]; then
    printf '%s_%s\n' "$SLURM_ARRAY_JOB_ID" "$SLURM_ARRAY_TASK_ID"
  else
    printf '%s\n' "$SLURM_JOB_ID"
  fi
}
