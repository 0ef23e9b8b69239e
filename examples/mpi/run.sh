#!/usr/bin/env bash
# Train with mpirun, Open MPI's or MPICH's, on a cluster without Slurm. From the project's root:
#   examples/mpi/run.sh PROCESSES CONFIG.yaml [SECTION.FIELD=VALUE ...]
#   HOSTFILE=hosts PER_NODE=8 examples/mpi/run.sh 16 examples/qwen2.5_math_7b/config.yaml
# A hostfile has a host in each line. MPIRUN and PYTHON choose other programs.
set -euo pipefail
if (($# < 2)); then
  sed -n 's/^# \{0,1\}//; 3,4p' "$0" >&2
  exit 2
fi
processes=$1
shift
mpirun=${MPIRUN:-mpirun} python=${PYTHON:-python3}
version=$("$mpirun" --version 2>&1) || true
options=(-n "$processes")
case $version in
  *HYDRA* | *[Mm][Pp][Ii][Cc][Hh]*)
    [[ -z ${HOSTFILE-} ]] || options+=(-f "$HOSTFILE")
    [[ -z ${PER_NODE-} ]] || options+=(-ppn "$PER_NODE")
    ;;
  *"Open MPI"* | *OpenRTE* | *PRRTE*)
    # Else a process is pinned to one core with all its threads; hosts get no variables by themselves.
    options+=(--bind-to none -x PATH)
    [[ -z ${PYTHONPATH-} ]] || options+=(-x PYTHONPATH)
    [[ -z ${HOSTFILE-} ]] || options+=(--hostfile "$HOSTFILE")
    [[ -z ${PER_NODE-} ]] || options+=(-npernode "$PER_NODE")
    ((EUID)) || options+=(--allow-run-as-root)
    [[ -z ${OVERSUBSCRIBE-} ]] || options+=(--oversubscribe)
    ;;
  *)
    echo "run.sh: $mpirun is neither Open MPI's nor MPICH's mpirun: ${version%%$'\n'*}" >&2
    exit 2
    ;;
esac
exec "$mpirun" "${options[@]}" "$python" -m nested_reft_mcore train "$@"
