#!/bin/bash
# Stands in for Python where only the scripts are looked at, in hundredfold less time: it fails, stops
# and dies as MODE says. Called as python is: -m nested_reft_mcore train CONFIG run_dir=DIR ...
run_dir=${5#run_dir=}
if [[ " $* " == *" --dry-run "* ]]; then
  mkdir -p "$run_dir"
  if [[ $MODE-${SLURM_RESTART_COUNT:-0} == early-0 ]]; then
    touch "$run_dir/checking"
    while :; do sleep 0.1; done
  fi
  printf 'run directory: %s\n' "$run_dir"
  exit 0
fi
printf '%s\n' "$*" >>"$run_dir/arguments.$SLURM_PROCID"
restart=${SLURM_RESTART_COUNT:-0}
echo "rank $SLURM_PROCID starts, restart $restart"

save() {
  ((SLURM_PROCID)) || echo "step $1" >"$run_dir/requeue"
}

wait_for_stop() {
  trap 'save 5; exit 75' USR1 TERM
  touch "$run_dir/waiting.$restart.$SLURM_PROCID"
  while :; do sleep 0.1; done
}

case $MODE-$restart-$SLURM_PROCID in
  fails-0-2) echo 'ValueError: the cause'; exit 1 ;;
  fails-*) sleep 1; echo 'RuntimeError: a consequence'; exit 4 ;;
  killed-0-1 | back_from_kill-0-1) sleep 0.5; kill -KILL $$ ;;
  killed-* | back_from_kill-0-*) sleep 2; echo 'RuntimeError: lost another process'; exit 4 ;;
  hangs-0-1) trap '' USR1 TERM; while :; do sleep 0.1; done ;;
  hangs-*) echo 'RuntimeError: rank 1 is silent'; exit 4 ;;
  # One has no handler, as before it has imported everything.
  stops-0-[023] | cancelled-* | stays-*) wait_for_stop ;;
  stops-0-1) touch "$run_dir/waiting.0.1"; while :; do sleep 0.1; done ;;
  no_progress-*) save 5; sleep 1; exit 75 ;;
  abrupt-0-*) wait_for_stop ;;
  first_lost-0-0) trap '' USR1 TERM; while :; do sleep 0.1; done ;;
  first_lost-*) echo '[rank 0 on node3] was lost: no sign of life for 9 s'; exit 4 ;;
  shared-0-0) sleep 1; echo 'error: train.jsonl does not exist'; exit 2 ;;
  shared-*) exit 2 ;;
esac
