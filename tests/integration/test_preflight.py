"""A bad node is named before the run begins, by every kind of check; a good one costs little."""

from __future__ import annotations

import json
import re
import shutil
import socket
import time
from pathlib import Path

import pytest
from run_cases import CONFIG, PIPELINE, REPOSITORY, finish, start, write_room

from nested_reft_mcore.cli.preflight import checkpoint_bytes
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.schema import ModelConfig
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.launch.preflight import Needs, Report, compare, examine

HOST = socket.gethostname()
ALONE = RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "single")


def report(rank: int, **more) -> Report:
    return Report(rank, f"node{rank}", {"torch": "2.13.0", "nested_reft_mcore": "abc"}, "", **more)


def test_equal_processes_are_fit() -> None:
    assert compare([report(0), report(1), report(2)], require_gpu=False) == []


def test_the_odd_version_is_named_with_its_node() -> None:
    reports = [report(0), report(1), report(2), report(3)]
    reports[2].versions["torch"] = "2.12.0"
    del reports[3].versions["nested_reft_mcore"]
    assert compare(reports, require_gpu=False) == [
        "versions: rank 3 on node3: this package's code, by checksum is not installed, on 3 of 4 "
        "processes abc",
        "versions: rank 2 on node2: torch is 2.12.0, on 3 of 4 processes 2.13.0",
    ]


def test_where_it_is_even_rank_0_is_right() -> None:
    reports = [report(0), report(1)]
    reports[1].versions["torch"] = "3.0"
    (problem,) = compare(reports, require_gpu=False)
    assert problem.startswith("versions: rank 1 on node1: torch is 3.0")


def test_a_gpu_that_some_see_or_the_config_wants() -> None:
    reports = [report(0), report(1)]
    reports[0].device = "H100"
    assert compare(reports, False) == ["gpu: rank 1 on node1: sees no GPU, and others see one"]
    (problem,) = compare([report(0)], True)
    assert problem == "gpu: rank 0 on node0: sees no GPU, and launch.require_gpu is set"


def test_what_a_node_finds_at_home(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    good = Needs(tmp_path / "run", (file, tmp_path), checkpoint_bytes=1000)
    found = examine(good, ALONE, None)
    assert found.problems == []
    # A file is read, and a directory's files are; the probe of the run directory is gone.
    assert found.num_files == 2
    assert list((tmp_path / "run").iterdir()) == []
    full = examine(Needs(tmp_path, checkpoint_bytes=10**18), ALONE, None).problems
    assert re.fullmatch(r"disk: .* free; 2 checkpoints of 1000000000.00 GB need .*", full[0])
    # /proc is a directory that nobody can write to, whoever asks.
    (unwritable,) = examine(Needs(Path("/proc/run")), ALONE, None).problems
    assert unwritable.startswith("write: /proc/run (run_dir): ")
    # As a file on a broken disk: it is there, and reading it fails.
    broken = tmp_path / "broken"
    broken.symlink_to("/proc/self/mem")
    (unreadable,) = examine(Needs(tmp_path, (broken,)), ALONE, None).problems
    assert re.fullmatch(rf"read: {broken}: .+", unreadable)
    (missing,) = examine(Needs(tmp_path, (tmp_path / "gone",)), ALONE, None).problems
    assert missing == f"read: {tmp_path / 'gone'}: does not exist"


def torchrun_like(room: Path, rank: int, port: int, *arguments: str, **more: str):
    """One process of two, each started by hand, as on two nodes."""
    launch = {
        **{"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
    }
    return start(room, *arguments, **launch, **more)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("room")
    write_room(directory)
    return directory


@pytest.mark.distributed
@pytest.mark.slow
def test_a_fit_job_is_told_in_a_table(room: Path) -> None:
    began = time.monotonic()
    sizes = ("parallel.tensor_model_parallel_size=1", "parallel.data_parallel_size=2")
    process = start(room, "preflight", "config.yaml", *sizes)
    code, out, err = finish(process)
    assert code == 0, err
    head, *rows = out.splitlines()
    taken = re.fullmatch(r"preflight: 2 processes on 1 nodes are fit \((\S+) s\)", head)
    assert taken is not None, out
    assert float(taken.group(1)) < min(60.0, time.monotonic() - began)
    names = [row.split("  ")[1].strip() for row in rows]
    assert names == ["versions", "devices", "read", "write", "disk", "data x 2"], out
    rates = re.search(r"all-reduce (\S+) GB/s, messages (\S+) GB/s", rows[-1])
    assert rates is not None, out
    assert all(float(rate) > 0 for rate in rates.groups())
    # Nothing of it is left where the run will be.
    assert [path.name for path in (room / "run").iterdir()] == ["logs"]


@pytest.mark.distributed
@pytest.mark.slow
def test_a_bad_node_ends_the_job_at_once_on_both(room: Path, tmp_path: Path) -> None:
    """Another version of the code there, and a run directory of its own: one start tells both."""
    other = tmp_path / "other"
    shutil.copytree(REPOSITORY / "nested_reft_mcore", other / "nested_reft_mcore")
    marker = other / "nested_reft_mcore" / "launch" / "exit_codes.py"
    marker.write_text(marker.read_text() + "# Changed.\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for name in ("task", "config.yaml"):
        (elsewhere / name).symlink_to(room / name)
    port = free_port()
    arguments = ("train", "config.yaml", PIPELINE, "run_dir=local")
    first = torchrun_like(room, 0, port, *arguments)
    second = torchrun_like(elsewhere, 1, port, *arguments, PYTHONPATH=str(other))
    code, _, err = finish(first)
    assert finish(second)[0] == code == 3, err
    shared, versions = err.splitlines()[-2:]
    assert shared.startswith(f"preflight: shared: rank 1 on {HOST}: local (run_dir) does not show")
    assert re.fullmatch(
        rf"  versions: rank 1 on {HOST}: this package's code, by checksum is \w+, on 1 of 2 "
        r"processes \w+",
        versions,
    )
    assert "Traceback" not in err


@pytest.mark.distributed
@pytest.mark.slow
def test_a_mistake_that_one_node_alone_finds_is_a_bad_node(room: Path, tmp_path: Path) -> None:
    """Its data is not mounted: both leave with 3. Where both find it, it is the user's: 2."""
    (tmp_path / "config.yaml").symlink_to(room / "config.yaml")
    ports = [free_port(), free_port()]
    arguments = ("train", "config.yaml", PIPELINE, "run_dir=mistake")
    jobs = [
        torchrun_like(room, 0, ports[0], *arguments),
        torchrun_like(tmp_path, 1, ports[0], *arguments),
        torchrun_like(tmp_path, 0, ports[1], *arguments),
        torchrun_like(tmp_path, 1, ports[1], *arguments),
    ]
    (c0, _, e0), (c1, _, _), (c2, _, e2), (c3, _, e3) = (finish(job) for job in jobs)
    assert (c0, c1) == (3, 3), e0
    assert f"preflight: start: rank 1 on {HOST}: data.train_path: task/train.jsonl does not" in e0
    assert (c2, c3) == (2, 2), e2
    assert e2.startswith("error: data.train_path: task/train.jsonl does not exist")
    assert e3 == ""


@pytest.mark.distributed
@pytest.mark.slow
def test_who_does_not_come_is_named(room: Path) -> None:
    arguments = ("preflight", "config.yaml", PIPELINE, "launch.join_deadline_seconds=5")
    code, _, err = finish(torchrun_like(room, 0, free_port(), *arguments))
    assert code == 3, err
    assert "join: 1 of 2 processes did not arrive within 5 s: ranks 1" in err


def test_the_room_that_is_asked_for_is_what_a_checkpoint_takes(room: Path) -> None:
    """Compared with one that is written: small models have a share of other files."""
    saved = room / "sized"
    sizes = CONFIG["model"]["architecture"] | {"hidden_size": 256, "ffn_hidden_size": 512}
    options = (
        "sft.num_steps=1",
        "data.train_path=task/sft.jsonl",
        "logging.tensorboard=false",
        "launch.preflight=never",
    )
    override = f"model.architecture={json.dumps(sizes)}"
    code, _, err = finish(start(room, "sft", "config.yaml", "run_dir=sized", override, *options))
    assert code == 0, err
    manifest = json.loads((saved / "checkpoints/step_00000001/manifest.json").read_text())
    weights = sum(f["bytes"] for name, f in manifest["files"].items() if name.endswith(".distcp"))
    model = ModelConfig(architecture=ModelArchitecture(**sizes))
    assert model.architecture is not None
    assert weights == pytest.approx(checkpoint_bytes(model, model.architecture), rel=0.1)
