# shellcheck shell=bash disable=SC2034
# What the job scripts share. They source this from the project's root, in the job's batch script on
# its first node, and call one function. README.md tells what env.sh may set.

set -u -o pipefail
PROJECT=$PWD
# shellcheck source=slurm/failure.sh
source "$PROJECT/slurm/failure.sh"
# shellcheck source=slurm/requeue.sh
source "$PROJECT/slurm/requeue.sh"

say() { printf 'slurm: %s\n' "$*"; }
fail() {
  printf 'slurm: error: %s\n' "$*" >&2
  exit "${FAIL_CODE:-2}"
}

# train_job CONFIG MODEL [ARGUMENT ...]: training, preflight included; comes back after a stop. Returns
# after the last step of the run, or else ends the job. MODEL is the Hugging Face directory to start
# from, unless the arguments name another CONFIG or other weights.
# ARGUMENT: another CONFIG.yaml (first), --dry-run, options of `nested-reft train`, SECTION.FIELD=VALUE.
train_job() {
  CONFIG=$1
  local model=$2
  shift 2
  is_config "${1-}" && model=''
  read_arguments "$@"
  [[ -z $model ]] || names_weights || ARGUMENTS+=(--hf "$model")
  begin_job
  ARGUMENTS=("${OVERRIDES[@]}" "${ARGUMENTS[@]}")
  if ((DRY_RUN)); then
    dry_run
    exit "$CODE"
  fi
  check_run
  note_start
  rm -f "$RUN_DIR/requeue"
  LOGS=$RUN_DIR/logs/job_$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  ((STOPPED)) && stop_at_start
  run_ranks train train "$CONFIG" "${ARGUMENTS[@]}"
  ((CODE == 0)) && [[ ! -f $RUN_DIR/requeue ]] || end_training train
}

# other_job COMMAND [ARGUMENT ...]: a command of nested-reft that has nothing to come back to.
other_job() {
  LOGS=$WORK_DIR/logs/$SLURM_JOB_NAME-$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}
  run_ranks "$1" "$@"
  ((CODE == 0)) && exit 0
  judge "$1"
  explain
  exit "$JOB_CODE"
}

# collect_runs DIRECTORY: one table of all runs in a directory. Tasks of an array take turns.
collect_runs() {
  flock "$1/.collecting" srun "${STEP[@]}" --nodes=1 --ntasks=1 --ntasks-per-node=1 \
    "${INTERPRETER[@]}" "$PROJECT/tools/collect_sweep.py" "$1" || fail "$1: results not collected"
}

# Whether the arguments say where the model comes from.
names_weights() {
  local argument
  for argument in "${ARGUMENTS[@]}"; do
    [[ $argument == @(--hf|--checkpoint|--hf=*|--checkpoint=*|model.@(hf_path|checkpoint|architecture)*) ]] && return
  done
  return 1
}

is_config() { [[ $1 == *.@(yaml|yml) && $1 != *=* ]]; }

# Sets CONFIG, DRY_RUN and ARGUMENTS. Nothing is ever evaluated: an override may hold any character.
read_arguments() {
  DRY_RUN=0
  ARGUMENTS=()
  if is_config "${1-}"; then
    CONFIG=$1
    shift
  fi
  local argument
  for argument; do
    if [[ $argument == --dry-run ]]; then
      DRY_RUN=1
    else
      ARGUMENTS+=("$argument")
    fi
  done
  # Read on every node, from another directory than this.
  [[ $CONFIG == /* ]] || CONFIG=$PROJECT/$CONFIG
}

# Site settings, address and command of this job; says what starts where.
begin_job() {
  [[ -n ${SLURM_JOB_ID-} ]] || fail "this is no job: start it with \`sbatch slurm/${0##*/}\`"
  read_site
  # The submitting shell may have been a process of another run.
  unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE
  TASKS_PER_NODE=${SLURM_NTASKS_PER_NODE:-$((SLURM_NTASKS / SLURM_JOB_NUM_NODES))}
  choose_address
  export PYTHONPATH=$PROJECT${PYTHONPATH:+:$PYTHONPATH} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
  STEP_PID='' STOPPED=0
  trap pass_on_stop USR1 TERM
  cd "$WORK_DIR" || fail "WORK_DIR=$WORK_DIR: no such directory"
  make_command
  say "job $SLURM_JOB_ID ($SLURM_JOB_NAME), restart ${SLURM_RESTART_COUNT:-0}, $(date '+%F %T'):" \
    "$SLURM_JOB_NUM_NODES x $TASKS_PER_NODE tasks on $SLURM_JOB_NODELIST, by $LAUNCHER," \
    "master $MASTER_ADDR:$MASTER_PORT"
}

# Settings of the site, from env.sh; whatever it leaves out has a default here.
read_site() {
  local file=${NESTED_REFT_ENV:-$PROJECT/slurm/env.sh}
  CONTAINER_MOUNTS=() SRUN_OPTIONS=() OVERRIDES=()
  : "${DRY_RUN:=0}"
  if [[ -f $file ]]; then
    # shellcheck disable=SC1090
    source "$file"
  elif ((DRY_RUN)); then
    say "$file is missing: this dry run takes the defaults"
  else
    fail "$file is missing; make it with \`cp slurm/env.example.sh slurm/env.sh\` and edit it"
  fi
  : "${WORK_DIR:=$PROJECT}" "${LAUNCHER:=srun}" "${PATIENCE_SECONDS:=60}"
  : "${MAX_IDLE_RESTARTS:=3}" "${REQUEUE_ON:=}" "${CONTAINER_IMAGE:=}" "${CONTAINER_RUNTIME:=pyxis}"
  : "${HARDWARE:=h100}"
  if [[ -z ${PYTHON-} ]]; then
    PYTHON=python3
    [[ -z $CONTAINER_IMAGE && -x $PROJECT/.venv/bin/python ]] && PYTHON=$PROJECT/.venv/bin/python
  fi
  [[ $LAUNCHER == @(srun|torchrun) ]] || fail "LAUNCHER=$LAUNCHER; expected srun or torchrun"
  if [[ -n ${SBATCH_PARTITION-} && $SBATCH_PARTITION != "${SLURM_JOB_PARTITION-}" ]]; then
    say "partition ${SLURM_JOB_PARTITION-}, though $file says $SBATCH_PARTITION:" \
      "source it before sbatch, which reads it there only"
  fi
}

# Rank 0's host, and a port that follows from the job's number: two jobs on a node have two. It is
# below the ports that systems hand out by themselves. One that is in use is passed over.
choose_address() {
  local hosts attempt
  hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST") || fail "scontrol show hostnames failed"
  MASTER_ADDR=${hosts%%$'\n'*}
  for ((attempt = 0; attempt < 100; attempt++)); do
    MASTER_PORT=$((15000 + (SLURM_JOB_ID * 131 + attempt) % 17000))
    (: <"/dev/tcp/127.0.0.1/$MASTER_PORT") 2>/dev/null || break
  done
  export MASTER_ADDR MASTER_PORT
}

# Sets INTERPRETER and COMMAND, which start Python and the package, and STEP, every srun's options.
make_command() {
  INTERPRETER=("$PYTHON")
  # Since 22.05 srun does not take it from the job. 1 GPU per task would hide the others from NCCL.
  STEP=(--input=none "${SRUN_OPTIONS[@]}")
  [[ -n ${SLURM_CPUS_PER_TASK-} ]] && STEP+=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
  [[ -z $CONTAINER_IMAGE ]] || use_container
  COMMAND=("${INTERPRETER[@]}" -m nested_reft_mcore)
}

# Turns INTERPRETER or STEP to the container.
use_container() {
  local mount
  local mounts=("$PROJECT:$PROJECT" "$WORK_DIR:$WORK_DIR" "${CONTAINER_MOUNTS[@]}")
  case $CONTAINER_RUNTIME in
    pyxis)
      STEP+=(--container-image="$CONTAINER_IMAGE" --container-workdir="$WORK_DIR"
        --container-mounts="$(IFS=,; printf '%s' "${mounts[*]}")")
      ;;
    apptainer)
      local prefix=(apptainer exec --nv --pwd "$WORK_DIR")
      for mount in "${mounts[@]}"; do prefix+=(--bind "$mount"); done
      INTERPRETER=("${prefix[@]}" "$CONTAINER_IMAGE" "$PYTHON")
      ;;
    *) fail "CONTAINER_RUNTIME=$CONTAINER_RUNTIME; expected pyxis or apptainer" ;;
  esac
}

# rank_command ARGUMENT ...: sets RANK_COMMAND, what srun runs for `nested-reft ARGUMENT ...`.
rank_command() {
  local patience=(--kill-on-bad-exit=0 --wait="$PATIENCE_SECONDS" --open-mode=append)
  if [[ $LAUNCHER == srun ]]; then
    RANK_COMMAND=(srun "${STEP[@]}" "${patience[@]}" --ntasks-per-node="$TASKS_PER_NODE"
      "${COMMAND[@]}" "$@")
    return
  fi
  local torchrun=("${INTERPRETER[@]}" -m torch.distributed.run
    --nnodes="$SLURM_JOB_NUM_NODES" --nproc-per-node="$TASKS_PER_NODE" --max-restarts=0
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --tee=3 --log-dir="${LOGS-}")
  # Not as options, which older ones of torch would refuse: time to save, and to pass USR1 on.
  export PET_SHUTDOWN_TIMEOUT=300 PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
  # A step that names no CPUs for its tasks gets all of the job.
  local step=() option
  for option in "${STEP[@]}"; do [[ $option == --cpus-per-task=* ]] || step+=("$option"); done
  unset SLURM_CPUS_PER_TASK
  # Only the task knows which node it is on.
  # shellcheck disable=SC2016
  RANK_COMMAND=(srun "${step[@]}" "${patience[@]}" --ntasks="$SLURM_JOB_NUM_NODES"
    --ntasks-per-node=1 bash -c 'export PET_NODE_RANK=$SLURM_NODEID; exec "$@"' torchrun
    "${torchrun[@]}" -m nested_reft_mcore "$@")
}

# The command, the layout and the memory plan, on every node. Sets CODE.
dry_run() {
  rank_command train "$CONFIG" "${ARGUMENTS[@]}"
  say "command: ${RANK_COMMAND[*]@Q}"
  describe --ntasks="$SLURM_JOB_NUM_NODES" --label |
    sort --stable --numeric-sort --field-separator=: --key=1,1
  CODE=$?
}

# describe OPTION ...: the dry run as a step of one task a node.
describe() {
  srun "${STEP[@]}" "$@" --ntasks-per-node=1 "${COMMAND[@]}" train "$CONFIG" "${ARGUMENTS[@]}" \
    --dry-run --nodes="$SLURM_JOB_NUM_NODES" --gpus-per-node="$TASKS_PER_NODE" --hardware="$HARDWARE"
}

# The same in one process, before all start: a mistake ends the job here. Sets RUN_DIR.
check_run() {
  local told
  told=$(describe --nodes=1 --ntasks=1 2>&1)
  CODE=$?
  RUN_DIR=$(sed -n 's/^run directory: //p' <<<"$told")
  # Stopped or preempted before anything ran.
  ((STOPPED || CODE == 138 || CODE == 143)) && stop_at_start
  # The plan is the same at every restart.
  ((CODE == 0 && ${SLURM_RESTART_COUNT:-0})) ||
    grep -v '^srun: error: .* Exited with exit code' <<<"$told"
  ((CODE == 0)) || exit "$CODE"
  grep -q '^DOES NOT FIT' <<<"$told" &&
    say "warning: by the memory plan this does not fit; it starts all the same"
}

# run_ranks NAME ARGUMENT ...: `nested-reft ARGUMENT ...` on every GPU. Each task has a file of its
# own, the first one is also shown here, with what srun says. Sets CODE.
run_ranks() {
  local name=$1 unit=rank
  shift
  can_write "$LOGS" || FAIL_CODE=3 fail "$LOGS: cannot be written; is the disk full?"
  [[ $LAUNCHER == torchrun ]] && unit=node
  TASK_LOG=$LOGS/$name.${unit}_%3t.log
  SRUN_LOG=$LOGS/$name.srun.log
  local first=${TASK_LOG/\%3t/000}
  rank_command "$@"
  RANK_COMMAND=("${RANK_COMMAND[0]}" --output="$TASK_LOG" "${RANK_COMMAND[@]:1}")
  say "$name: logs are $LOGS/$name.${unit}_*.log"
  : >"$first"
  : >"$SRUN_LOG"
  "${RANK_COMMAND[@]}" 2>"$SRUN_LOG" &
  STEP_PID=$!
  # Shows all of both files, and ends after the step; a signal to the whole job must not end it.
  (
    trap '' USR1 TERM
    exec tail --quiet --lines=+1 --follow=name --sleep-interval=0.5 --pid="$STEP_PID" \
      "$first" "$SRUN_LOG"
  ) &
  local follower=$!
  await "$STEP_PID"
  STEP_PID=
  local code=$CODE
  await "$follower"
  CODE=$code
}

# Whether a file of some size can be made in a directory.
can_write() {
  local probe=$1/.probe.$SLURM_JOB_ID code
  mkdir -p "$1" && head -c 1000000 /dev/zero >"$probe"
  code=$?
  rm -f "$probe"
  return "$code"
} 2>/dev/null

# await PID: sets CODE. A signal that the shell catches ends a wait: then it waits again.
await() {
  local code
  CODE=0
  while :; do
    STOPPED=0
    wait "$1"
    code=$?
    # 127: the signal came after the end of a wait that had the code already.
    ((code == 127)) || CODE=$code
    ((STOPPED)) || break
  done
}

# The batch script got a signal (sbatch --signal=B:, scancel --batch or --full): the tasks need it.
pass_on_stop() {
  STOPPED=1
  [[ -z $STEP_PID ]] || kill -USR1 "$STEP_PID" 2>/dev/null || true
}
