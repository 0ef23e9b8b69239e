"""Who am I: read from what torchrun, mpirun, srun or our own start put into the environment."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator, Mapping

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.context import Launcher, RankInfo
from nested_reft_mcore.launch.parent import LOCAL_MARKER

# rank, size, rank on the node, size of the node. Slurm's srun sets none of Open MPI's four (with
# --mpi=pmix it sets PMIX_RANK and PMIX_NAMESPACE), and with --mpi=pmi2 it sets PMI_RANK, PMI_SIZE
# and PMI_FD, but neither MPI_LOCALRANKID nor MPI_LOCALNRANKS. Those come from hydra, the mpirun of
# MPICH and Intel MPI. Seen with Open MPI 4.1 and 5.0, MPICH 4.0 and 5.0, and Slurm 22.05.
_OPEN_MPI = (
    "OMPI_COMM_WORLD_RANK",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_LOCAL_RANK",
    "OMPI_COMM_WORLD_LOCAL_SIZE",
)
_HYDRA = ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
_RENDEZVOUS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
# Higher step numbers stand for batch scripts, interactive shells and Slurm's own needs.
_FIRST_SPECIAL_STEP = 0xFFFFFFF0
_FIRST_PORT, _NUM_PORTS = 15000, 17000


def node_name(env: Mapping[str, str]) -> str:
    """What to call this machine: as Slurm does, which may differ from its host name."""
    return env.get("SLURMD_NODENAME") or socket.gethostname()


def discover_ranks(env: Mapping[str, str]) -> RankInfo | None:
    """Read this process's rank from the environment; None if nobody launched it as one of several.

    A batch script or an `salloc` shell is not a step of Slurm and counts as bare, whatever
    `SLURM_NTASKS` says; so does the only process of an mpirun. torchrun wins over srun and mpirun,
    which often start torchrun. mpirun wins over srun: inside a job it starts its daemons through
    srun, and the processes see the step and the task numbers of their daemon. Under srun
    `MASTER_ADDR` and `MASTER_PORT` are taken where set; else the master is the first host of the
    step and the port follows from the numbers of job and step. Under mpirun neither is known here.

    Raises:
        UserError: variables contradict each other or some are missing; the message names them.
    """
    if "RANK" in env:
        return _from_rendezvous(env)
    names = _mpirun_names(env)
    if names is not None:
        ranks = _from_mpirun(env, names)
        return ranks if ranks.world_size > 1 else None
    if _is_step(env):
        return _from_step(env)
    left = [name for name in ("WORLD_SIZE", "LOCAL_RANK") if name in env]
    if left:
        raise UserError(
            f"environment: {' and '.join(left)} set without RANK; expected all of "
            f"{', '.join(_RENDEZVOUS)} (torchrun sets them) or none of them"
        )
    return None


def expand_nodelist(nodelist: str) -> list[str]:
    """Host names of a Slurm node list: `n[01-03,7],login` is n01, n02, n03, n7, login.

    Raises:
        UserError: the brackets or ranges are malformed.
    """
    return [host for item in _split_outside_brackets(nodelist) for host in _expand(item, nodelist)]


def _expand(item: str, nodelist: str) -> Iterator[str]:
    """Expand one entry, its leftmost bracket first."""
    found = re.fullmatch(r"([^\[\]]*)\[([0-9,-]+)\](.*)", item)
    if found is None:
        if "[" in item or "]" in item or not item:
            raise UserError(f"environment: cannot read the Slurm node list {nodelist!r}")
        yield item
        return
    prefix, ranges, rest = found.groups()
    tails = list(_expand(rest, nodelist)) if rest else [""]
    for part in ranges.split(","):
        bounds = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if bounds is None:
            raise UserError(
                f"environment: cannot read {part!r} in the Slurm node list {nodelist!r}"
            )
        first, last = bounds.group(1), bounds.group(2) or bounds.group(1)
        for number in range(int(first), int(last) + 1):
            yield from (f"{prefix}{number:0{len(first)}d}{tail}" for tail in tails)


def _split_outside_brackets(nodelist: str) -> list[str]:
    """Split at the commas that stand outside brackets."""
    return re.split(r",(?![^\[]*\])", nodelist.strip())


def _number(env: Mapping[str, str], name: str, least: int = 0) -> int:
    """A whole number from the environment."""
    text = env.get(name)
    if text is None:
        raise UserError(f"environment: {name} is missing")
    if not re.fullmatch(r"\d+", text) or int(text) < least:
        raise UserError(f"environment: {name}={text!r}; expected a whole number from {least} up")
    return int(text)


def _from_rendezvous(env: Mapping[str, str]) -> RankInfo:
    """torchrun's variables, which the local start sets as well."""
    missing = [name for name in _RENDEZVOUS if name not in env]
    if missing:
        raise UserError(
            f"environment: RANK is set, missing: {', '.join(missing)}; "
            "start with torchrun, mpirun or srun, or unset RANK"
        )
    launcher: Launcher = "local" if env.get(LOCAL_MARKER) == "local" else "torchrun"
    world_size = _number(env, "WORLD_SIZE", least=1)
    local_rank = _number(env, "LOCAL_RANK")
    # Not torchrun's duty to anybody but torch: other launchers that imitate it may leave it out.
    local_world_size = (
        _number(env, "LOCAL_WORLD_SIZE", least=1)
        if "LOCAL_WORLD_SIZE" in env
        else max(local_rank + 1, 1)
    )
    ranks = RankInfo(
        rank=_number(env, "RANK"),
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=env["MASTER_ADDR"],
        master_port=_port(env),
        launcher=launcher,
    )
    return _consistent(ranks, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def _port(env: Mapping[str, str]) -> int:
    port = _number(env, "MASTER_PORT", least=1)
    if port > 65535:
        raise UserError(f"environment: MASTER_PORT={port}; expected at most 65535")
    return port


def _consistent(
    ranks: RankInfo, rank: str, world_size: str, local_rank: str, local_world_size: str
) -> RankInfo:
    """Check that the numbers fit into each other; the names are the variables to blame."""
    if ranks.rank >= ranks.world_size:
        raise UserError(
            f"environment: {rank}={ranks.rank} is not below {world_size}={ranks.world_size}"
        )
    if ranks.local_rank >= ranks.local_world_size:
        raise UserError(
            f"environment: {local_rank}={ranks.local_rank} is not below "
            f"{local_world_size}={ranks.local_world_size}"
        )
    if ranks.local_world_size > ranks.world_size:
        raise UserError(
            f"environment: {local_world_size}={ranks.local_world_size} is more than "
            f"{world_size}={ranks.world_size}"
        )
    return ranks


def _mpirun_names(env: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    """The variables of the mpirun that started this process, if one did."""
    if "OMPI_COMM_WORLD_RANK" in env:
        return _OPEN_MPI
    return _HYDRA if "PMI_RANK" in env and "MPI_LOCALRANKID" in env else None


def _from_mpirun(env: Mapping[str, str], names: tuple[str, str, str, str]) -> RankInfo:
    """mpirun's variables; the address is for rank 0 to choose."""
    rank, world_size, local_rank, local_world_size = names
    ranks = RankInfo(
        rank=_number(env, rank),
        world_size=_number(env, world_size, least=1),
        local_rank=_number(env, local_rank),
        local_world_size=_number(env, local_world_size, least=1),
        master_addr="",
        master_port=0,
        launcher="mpirun",
    )
    return _consistent(ranks, *names)


def _is_step(env: Mapping[str, str]) -> bool:
    """Whether srun started this process, as opposed to a batch script or an allocation's shell."""
    step = env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", ""))
    return step.isdigit() and int(step) < _FIRST_SPECIAL_STEP and "SLURM_PROCID" in env


def _from_step(env: Mapping[str, str]) -> RankInfo:
    """srun's variables."""
    nodelist_name = next(
        (name for name in ("SLURM_STEP_NODELIST", "SLURM_NODELIST") if env.get(name)), None
    )
    tasks_name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in env else "SLURM_NTASKS"
    required = ("SLURM_LOCALID", "SLURM_JOB_ID", tasks_name)
    missing = [name for name in required if name not in env]
    if nodelist_name is None:
        missing.append("SLURM_STEP_NODELIST")
    if missing or nodelist_name is None:
        raise UserError(
            f"environment: this is a step of Slurm, but {', '.join(missing)} is missing"
        )
    world_size = _number(env, tasks_name, least=1)
    if "WORLD_SIZE" in env and _number(env, "WORLD_SIZE", least=1) != world_size:
        raise UserError(
            f"environment: WORLD_SIZE={env['WORLD_SIZE']} but {tasks_name}={world_size}; "
            "unset WORLD_SIZE or start as many tasks"
        )
    hosts = expand_nodelist(env[nodelist_name])
    step = int(env.get("SLURM_STEP_ID", env.get("SLURM_STEPID", "0")))
    port = _FIRST_PORT + (_number(env, "SLURM_JOB_ID") * 131 + step) % _NUM_PORTS
    local_world_size, local_size_name = _tasks_on_this_node(env, world_size, len(hosts))
    ranks = RankInfo(
        rank=_number(env, "SLURM_PROCID"),
        world_size=world_size,
        local_rank=_number(env, "SLURM_LOCALID"),
        local_world_size=local_world_size,
        master_addr=env.get("MASTER_ADDR") or hosts[0],
        master_port=_port(env) if "MASTER_PORT" in env else port,
        launcher="srun",
    )
    return _consistent(ranks, "SLURM_PROCID", tasks_name, "SLURM_LOCALID", local_size_name)


def _tasks_on_this_node(env: Mapping[str, str], world_size: int, num_nodes: int) -> tuple[int, str]:
    """How many tasks the step has on this node, and the variable that says so."""
    for name in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE"):
        if name in env:
            counts = _expand_counts(env[name], name)
            node = _number(env, "SLURM_NODEID") if "SLURM_NODEID" in env else 0
            if node >= len(counts):
                raise UserError(
                    f"environment: SLURM_NODEID={node}, but {name}={env[name]!r} "
                    f"has {len(counts)} nodes"
                )
            return counts[node], name
    # Slurm fills nodes evenly, and the first ones take what is left over.
    return -(-world_size // num_nodes), "tasks per node"


def _expand_counts(text: str, name: str) -> list[int]:
    """Expand `2(x3),1` to 2, 2, 2, 1."""
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if found is None:
            raise UserError(f"environment: {name}={text!r}; expected counts such as 2(x3),1")
        counts += [int(found.group(1))] * int(found.group(2) or 1)
    return counts
