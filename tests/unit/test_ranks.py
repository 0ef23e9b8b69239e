"""Each launcher's environment is read right, and nothing else is taken for a launch."""

import os
import subprocess
import sys

import pytest

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.launch.mpi import common_code
from nested_reft_mcore.launch.mpi_library import library_name
from nested_reft_mcore.launch.ranks import discover_ranks, expand_nodelist

TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "MASTER_ADDR": "head",
    "MASTER_PORT": "29500",
}
# As in a task of `srun --nodes=2 --ntasks=3` inside a batch job.
STEP = {
    "SLURM_JOB_ID": "4242",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "2",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "1",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_STEP_NODELIST": "node[01-02]",
    "SLURM_JOB_NODELIST": "node[01-08]",
}
# As in a process of `mpirun -n 4` of Open MPI (4.1 and 5.0 alike), four to a node.
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "3",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4",
    "OMPI_COMM_WORLD_NODE_RANK": "3",
    "OMPI_UNIVERSE_SIZE": "4",
    "PMIX_RANK": "3",
    "PMIX_NAMESPACE": "2073624577",
}
# The same of MPICH (4.0 and 5.0 alike) and Intel MPI.
HYDRA = {
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "PMI_FD": "6",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
}
# What `srun --mpi=pmi2` and `srun --mpi=pmix` add to a step.
PMI2 = {"PMI_RANK": "2", "PMI_SIZE": "3", "PMI_FD": "11", "SLURM_MPI_TYPE": "pmi2"}
PMIX = {"PMIX_RANK": "2", "PMIX_NAMESPACE": "slurm.pmix.4242.0", "SLURM_MPI_TYPE": "pmix"}


def without(env, *names):
    return {name: value for name, value in env.items() if name not in names}


def refusal(env) -> str:
    with pytest.raises(UserError) as caught:
        discover_ranks(env)
    return str(caught.value)


def test_nothing_set_is_bare():
    assert discover_ranks({"PATH": "/bin", "MASTER_ADDR": "left.over"}) is None


def test_torchrun():
    assert discover_ranks(TORCHRUN) == RankInfo(5, 8, 1, 4, "head", 29500, "torchrun")


def test_our_own_start():
    env = TORCHRUN | {"NESTED_REFT_LAUNCHER": "local"}
    found = discover_ranks(env)
    assert found is not None
    assert found.launcher == "local"


def test_torchrun_inside_srun_is_torchrun():
    found = discover_ranks(STEP | TORCHRUN)
    assert found is not None
    assert (found.launcher, found.rank) == ("torchrun", 5)


def test_srun():
    found = discover_ranks(STEP)
    assert found is not None
    assert (found.rank, found.world_size, found.local_rank, found.local_world_size) == (2, 3, 0, 1)
    assert (found.master_addr, found.launcher) == ("node01", "srun")


def test_every_task_of_a_step_finds_the_same_master():
    tasks = [(0, 0, 0), (1, 1, 0), (2, 0, 1)]
    found = [
        discover_ranks(
            STEP
            | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(local), "SLURM_NODEID": str(node)}
        )
        for rank, local, node in tasks
    ]
    assert len({(f.master_addr, f.master_port) for f in found if f}) == 1
    assert [f.local_world_size for f in found if f] == [2, 2, 1]


def test_the_port_differs_between_steps_and_between_jobs():
    ports = {
        found.master_port
        for job in ("4242", "4243")
        for step in ("0", "1", "2")
        if (found := discover_ranks(STEP | {"SLURM_JOB_ID": job, "SLURM_STEP_ID": step}))
    }
    assert len(ports) == 6
    assert all(1024 < port < 32768 for port in ports)


def test_srun_takes_the_users_master():
    found = discover_ranks(STEP | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "5000"})
    assert found is not None
    assert (found.master_addr, found.master_port) == ("10.0.0.1", 5000)


def test_a_smaller_step_in_a_larger_job_counts_its_own_tasks():
    found = discover_ranks(
        STEP
        | {
            "SLURM_NTASKS": "16",
            "SLURM_STEP_NUM_TASKS": "1",
            "SLURM_STEP_TASKS_PER_NODE": "1",
            "SLURM_PROCID": "0",
            "SLURM_NODEID": "0",
        }
    )
    assert found is not None
    assert found.world_size == 1


@pytest.mark.parametrize(
    "env",
    [
        without(STEP, "SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS", "SLURM_STEP_TASKS_PER_NODE"),
        STEP | {"SLURM_STEP_ID": "4294967291", "SLURM_PROCID": "0"},
        STEP | {"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "2"},
    ],
    ids=["batch script", "batch step number", "interactive step", "salloc"],
)
def test_a_batch_script_or_allocation_is_bare(env):
    assert discover_ranks(env) is None


@pytest.mark.parametrize(
    ("env", "local"), [(OPEN_MPI, (3, 4)), (HYDRA, (1, 2))], ids=["Open MPI", "hydra"]
)
def test_mpirun(env, local):
    assert discover_ranks(env) == RankInfo(3, 4, *local, "", 0, "mpirun")


@pytest.mark.parametrize("env", [OPEN_MPI, HYDRA], ids=["Open MPI", "hydra"])
def test_mpirun_in_a_job_wins_over_the_step_of_its_daemon(env):
    """The daemon is the only task on its node, and its processes inherit its numbers."""
    found = discover_ranks(STEP | {"WORLD_SIZE": "7"} | env)
    assert found is not None
    assert (found.launcher, found.rank, found.world_size) == ("mpirun", 3, 4)


@pytest.mark.parametrize("more", [PMI2, PMIX], ids=["pmi2", "pmix"])
def test_srun_with_mpi_support_is_srun(more):
    found = discover_ranks(STEP | more)
    assert found is not None
    assert (found.launcher, found.rank, found.world_size) == ("srun", 2, 3)


@pytest.mark.parametrize("env", [OPEN_MPI, HYDRA], ids=["Open MPI", "hydra"])
@pytest.mark.parametrize("marker", [{}, {"NESTED_REFT_LAUNCHER": "local"}])
def test_torchrun_and_our_own_start_win_over_mpirun(env, marker):
    found = discover_ranks(env | TORCHRUN | marker)
    assert found is not None
    assert (found.launcher, found.rank) == ("local" if marker else "torchrun", 5)


@pytest.mark.parametrize(
    "env",
    [
        dict.fromkeys(OPEN_MPI, "0") | {f"OMPI_COMM_WORLD{s}_SIZE": "1" for s in ("", "_LOCAL")},
        {"PMI_RANK": "0", "PMI_SIZE": "1", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"},
    ],
    ids=["Open MPI", "hydra"],
)
def test_one_process_of_mpirun_is_bare(env):
    assert discover_ranks(env) is None
    # Also inside a job, where the daemon's step would otherwise count.
    assert discover_ranks(STEP | env) is None


@pytest.mark.parametrize(
    ("env", "part"),
    [
        (without(OPEN_MPI, "OMPI_COMM_WORLD_SIZE"), "OMPI_COMM_WORLD_SIZE is missing"),
        (without(HYDRA, "PMI_SIZE"), "PMI_SIZE is missing"),
        (OPEN_MPI | {"OMPI_COMM_WORLD_RANK": "4"}, "OMPI_COMM_WORLD_RANK=4 is not below"),
        (HYDRA | {"MPI_LOCALRANKID": "x"}, "MPI_LOCALRANKID='x'"),
    ],
)
def test_impossible_mpirun(env, part):
    assert part in refusal(env)


@pytest.mark.parametrize("name", ["WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"])
def test_incomplete_torchrun_names_what_is_missing(name):
    assert f"missing: {name};" in refusal(without(TORCHRUN, name))


def test_no_rank_names_what_is_there():
    assert "WORLD_SIZE and LOCAL_RANK set without RANK" in refusal(without(TORCHRUN, "RANK"))


@pytest.mark.parametrize("name", ["SLURM_LOCALID", "SLURM_JOB_ID", "SLURM_STEP_NODELIST"])
def test_incomplete_step_names_what_is_missing(name):
    assert f"{name} is missing" in refusal(without(STEP, name))


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"RANK": "8"}, ("RANK=8", "WORLD_SIZE=8")),
        ({"LOCAL_RANK": "4"}, ("LOCAL_RANK=4", "LOCAL_WORLD_SIZE=4")),
        ({"LOCAL_WORLD_SIZE": "9"}, ("LOCAL_WORLD_SIZE=9", "WORLD_SIZE=8")),
        ({"RANK": "one"}, ("RANK='one'",)),
        ({"RANK": "-1"}, ("RANK='-1'",)),
        ({"WORLD_SIZE": "0"}, ("WORLD_SIZE='0'",)),
        ({"MASTER_PORT": "70000"}, ("MASTER_PORT=70000",)),
    ],
)
def test_impossible_torchrun(changes, parts):
    text = refusal(TORCHRUN | changes)
    assert all(part in text for part in parts), text


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"SLURM_PROCID": "3"}, ("SLURM_PROCID=3", "SLURM_STEP_NUM_TASKS=3")),
        ({"SLURM_LOCALID": "1"}, ("SLURM_LOCALID=1", "SLURM_STEP_TASKS_PER_NODE=1")),
        ({"WORLD_SIZE": "4"}, ("WORLD_SIZE=4", "SLURM_STEP_NUM_TASKS=3")),
        ({"SLURM_NODEID": "2"}, ("SLURM_NODEID=2", "2 nodes")),
        ({"SLURM_STEP_TASKS_PER_NODE": "2(y"}, ("SLURM_STEP_TASKS_PER_NODE='2(y'",)),
    ],
)
def test_impossible_step(changes, parts):
    text = refusal(STEP | changes)
    assert all(part in text for part in parts), text


def test_repeated_task_counts():
    env = STEP | {
        "SLURM_STEP_TASKS_PER_NODE": "4(x2),1",
        "SLURM_STEP_NUM_TASKS": "9",
        "SLURM_PROCID": "8",
        "SLURM_NODEID": "2",
        "SLURM_STEP_NODELIST": "n[1-3]",
    }
    found = discover_ranks(env)
    assert found is not None
    assert (found.local_world_size, found.world_size) == (1, 9)


@pytest.mark.parametrize(
    ("nodelist", "hosts"),
    [
        ("login", ["login"]),
        ("node[01-04,7]", ["node01", "node02", "node03", "node04", "node7"]),
        ("a1,b[2-3],c", ["a1", "b2", "b3", "c"]),
        ("gpu-[098-101]-ib", ["gpu-098-ib", "gpu-099-ib", "gpu-100-ib", "gpu-101-ib"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
    ],
)
def test_node_lists(nodelist, hosts):
    assert expand_nodelist(nodelist) == hosts


@pytest.mark.parametrize("nodelist", ["", "node[1", "node[a-b]", "node[1-]", "node]1[", "a,,b"])
def test_broken_node_lists(nodelist):
    with pytest.raises(UserError, match="node list"):
        expand_nodelist(nodelist)


@pytest.mark.parametrize(
    ("codes", "common"),
    [
        ([0, 0], 0),
        ([75, 75, 75], 75),
        ([1, 1], 1),
        ([0, 3], 3),
        ([75, 5, 0], 5),
        ([75, 0], 1),
    ],
)
def test_one_code_for_all_of_an_mpirun(codes, common):
    assert common_code(codes) == common


@pytest.mark.parametrize(
    ("version", "name"),
    [
        ("Open MPI v4.1.4, package: Debian OpenMPI, ident: 4.1.4", "Open MPI v4.1.4"),
        ("MPICH Version:      5.0.2\nMPICH Release date: Fri", "MPICH 5.0.2"),
        (
            "Intel(R) MPI Library 2021.11 for Linux* OS\n",
            "Intel(R) MPI Library 2021.11 for Linux* OS",
        ),
        (" ", "an MPI without a name"),
    ],
)
def test_names_of_mpi_libraries(version, name):
    assert library_name(version) == name


def test_discovery_needs_neither_torch_nor_mpi4py():
    code = (
        "import os, sys; from nested_reft_mcore.launch.ranks import discover_ranks; "
        "assert discover_ranks(os.environ).launcher == 'mpirun'; "
        "assert not {'torch', 'mpi4py'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, **OPEN_MPI})
