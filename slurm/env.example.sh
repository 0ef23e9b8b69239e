# shellcheck shell=bash disable=SC2034
# What differs from site to site. Copy to env.sh, which git ignores, and edit: all that is commented
# out shows its default or an example. `VARIABLE=value sbatch ...` wins where a line has this form:
#   : "${VARIABLE:=value}"

# --- read by sbatch itself, so `source slurm/env.sh` in your shell before it -------------------
# export SBATCH_PARTITION=gpu
# export SBATCH_ACCOUNT=my_project
# export SBATCH_TIMELIMIT=12:00:00

# --- where things are ----------------------------------------------------------------------------
# Relative paths in configurations (models/, data/, runs/) start here; default: the project.
# : "${WORK_DIR:=/shared/scratch/$USER/nested-reft}"
# What memory is planned for before a run: a100-80, h100, h200, or a file (docs/planning.md).
# : "${HARDWARE:=h100}"
# Options that every run of this site has; the command line's come after these and win.
# OVERRIDES=(reward.num_workers=4)

# --- the Python that has torch and Megatron-Core ---------------------------------------------------
# Without a container; default: .venv/bin/python of the project.
# PYTHON=/shared/envs/nested-reft/bin/python
# In a container, by Slurm's pyxis plugin (with enroot) or by apptainer. The project and WORK_DIR are
# mounted anyway; PYTHON is then one inside, by default python3.
# CONTAINER_IMAGE=/shared/images/pytorch.sqsh
# CONTAINER_RUNTIME=pyxis # or apptainer
# CONTAINER_MOUNTS=(/shared/models:/shared/models)
# module load cuda

# --- network -----------------------------------------------------------------------------------------
# The interface that nodes see each other on, for the meeting point (gloo) and for NCCL.
# export GLOO_SOCKET_IFNAME=ib0 NCCL_SOCKET_IFNAME=ib0
# export NCCL_IB_HCA=mlx5
# export NCCL_DEBUG=WARN
# A collective that fails ends its process instead of hanging.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1

# --- how jobs start and come back --------------------------------------------------------------------
# srun: a task for each GPU. torchrun: one for each node, which starts the others.
# : "${LAUNCHER:=srun}"
# Options of every srun.
# SRUN_OPTIONS=(--mpi=none --cpu-bind=cores)
# Once a task has ended, the others get so many seconds until srun ends them by force. Must be longer
# than what the last rank does alone at the end of a run.
# : "${PATIENCE_SECONDS:=60}"
# Exit codes, beside a stop that was asked for, after which the job is requeued: 3 is a bad node,
# 4 a process that was lost or hung.
# : "${REQUEUE_ON:=3 4}"
# Restarts of a job without a new checkpoint before it is left alone.
# : "${MAX_IDLE_RESTARTS:=3}"
