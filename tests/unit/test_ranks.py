"""Each launcher's environment is read right, and nothing else is taken for a launch."""

import pytest

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.context import RankInfo
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
