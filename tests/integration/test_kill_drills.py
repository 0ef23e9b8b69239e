"""Killed or stopped at any moment and started again, a run computes what it would have anyway.

One run directory goes through many deaths: each start dies at another moment, and the next finds
what it left. What counts is that the metrics, rollouts and evaluations of all of them together are
those of a run that nothing interrupts, bit for bit.
"""

from __future__ import annotations

import json
import re
import resource
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from run_cases import PIPELINE, finish, metrics_of, start, wait_until, without_times, write_room

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

WHOLE = ("train.num_steps=8", "evaluation.interval=4")
REPLAYED_STEP = 4


def train(run_dir: str, *more: str) -> tuple[str, ...]:
    return ("train", "config.yaml", f"run_dir={run_dir}", "logging.tensorboard=false", *more)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, and the runs that nothing interrupts: `whole`, and `whole2` on two stages."""
    directory = tmp_path_factory.mktemp("room")
    write_room(directory)
    keep = (f"checkpoint.keep_every={REPLAYED_STEP}",)
    runs = [
        start(directory, *train("whole", *WHOLE, *keep)),
        start(directory, *train("whole2", *WHOLE, PIPELINE)),
    ]
    for process in runs:
        code, _, err = finish(process)
        assert code == 0, err
    return directory


def die(room: Path, arguments: tuple[str, ...], fault: str, code: int) -> str:
    """Start a run that ends at `fault`; what it said."""
    found, _, err = finish(start(room, *arguments, NESTED_REFT_FAULT=fault))
    assert found == code, err
    return err


def resumed_at(err: str) -> int:
    """The step after which a start says that it goes on."""
    match = re.search(r"going on after step (\d+)", err)
    assert match is not None, err
    return int(match.group(1))


def update_of(run_dir: Path, step: int) -> dict[str, Any]:
    """The line of metrics that tells of a step's updates."""
    lines = [line for line in metrics_of(run_dir) if "actor/pg_loss" in line]
    (found,) = (line for line in lines if line["step"] == step)
    return found


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


def assert_same_course(found: Path, expected: Path) -> None:
    """Metrics, rollouts and evaluations hold the same bits."""
    lines = without_times(metrics_of(expected))
    assert [line["step"] for line in lines] == list(range(9))
    assert without_times(metrics_of(found)) == lines
    for folder in ("rollouts", "evaluation"):
        files = sorted(path.name for path in (expected / folder).iterdir())
        assert files == sorted(path.name for path in (found / folder).iterdir())
        for name in files:
            assert (found / folder / name).read_bytes() == (expected / folder / name).read_bytes()


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.fixture(scope="module")
def drills(room: Path) -> Iterator[dict[str, Future[None]]]:
    """Two long chains of starts, side by side: the first one needs a single core."""
    with ThreadPoolExecutor() as pool:
        yield {chain.__name__: pool.submit(chain, room) for chain in (die_everywhere, stop_stages)}


def test_every_moment_of_death(drills: dict[str, Future[None]]) -> None:
    drills["die_everywhere"].result()


def test_stops_of_two_stages(drills: dict[str, Future[None]]) -> None:
    drills["stop_stages"].result()


def die_everywhere(room: Path) -> None:
    """One process that waits for its saves: every start's place to go on from is known."""
    run_dir = room / "killed"
    options = ("checkpoint.interval=1", "checkpoint.keep_every=4", "checkpoint.async_save=false")
    command = train("killed", *WHOLE, *options)
    killed = -signal.SIGKILL
    die(room, command, "mid-rollout@2", killed)
    assert names(run_dir) == ["latest", "step_00000001", "step_00000002"]
    assert resumed_at(die(room, command, "mid-update@3", killed)) == 2
    assert resumed_at(die(room, command, "before-manifest@4", killed)) == 3
    (partial,) = (run_dir / "checkpoints").glob(".partial_step_00000004.*")
    assert (partial / ".metadata").exists()
    assert not (partial / "manifest.json").exists()
    assert resumed_at(die(room, command, "before-latest@5", killed)) == 3
    assert (run_dir / "checkpoints" / "latest").read_text() == "step_00000004\n"
    assert not partial.exists()
    # The newest whole one counts, not what `latest` says.
    assert resumed_at(die(room, command, "mid-removal@6", killed)) == 5
    assert ".removed_step_00000003.0" in names(run_dir)
    # A checkpoint that the disk has spoilt is passed over, and said to be.
    flip_a_bit(run_dir / "checkpoints" / "step_00000006" / "__0_0.distcp")
    code, _, err = finish(start(room, *command))
    assert code == 0, err
    assert resumed_at(err) == 5
    assert re.search(r"PASSED OVER checkpoint \S+step_00000006: __0_0\.distcp: has checksum", err)
    spoilt = "passed_over_step_00000006.0"
    expected = ["latest", spoilt, "step_00000004", "step_00000007", "step_00000008"]
    assert names(run_dir) == expected
    assert_same_course(run_dir, room / "whole")
    # By name it is refused.
    other = train("other", *WHOLE, f"checkpoint.resume=killed/checkpoints/{spoilt}")
    code, _, err = finish(start(room, *other))
    assert code == 2, err
    assert f"error: killed/checkpoints/{spoilt}: is broken: __0_0.distcp: has checksum" in err
    assert "Traceback" not in err


def stop_stages(room: Path) -> None:
    """Saves in the background; told to stop while generating and evaluating, on either process."""
    run_dir = room / "stages"
    command = train("stages", *WHOLE, PIPELINE, "checkpoint.interval=3")
    die(room, command, "mid-evaluation@0:1:SIGTERM", 75)
    assert names(run_dir) == ["latest", "step_00000000"]
    assert (run_dir / "requeue").read_text() == "step 0\n"
    assert not (run_dir / "evaluation").exists()
    err = die(room, command, "mid-rollout@3:1:SIGTERM", 75)
    assert resumed_at(err) == 0
    assert (run_dir / "requeue").read_text() == "step 3\n"
    assert "step_00000003" in names(run_dir)
    assert not (run_dir / "rollouts" / "step_000003.dp0.jsonl").exists()
    # The step is done, its evaluation is not, and its metrics wait for it.
    assert resumed_at(die(room, command, "mid-evaluation@4:0:SIGTERM", 75)) == 3
    assert [line["step"] for line in metrics_of(run_dir) if "actor/lr" in line] == [1, 2, 3]
    # Evaluated and recorded, but not in a checkpoint: the next start does both again.
    process = start(room, *command, NESTED_REFT_FAULT="before-manifest@6")
    code, _, err = finish(process)
    assert code not in (0, 75), err
    assert metrics_of(run_dir)[-1]["step"] >= 5
    code, _, err = finish(start(room, *command))
    assert code == 0, err
    assert resumed_at(err) == 4
    assert_same_course(run_dir, room / "whole2")


def test_first_update_at_other_layouts(room: Path) -> None:
    """From the dumped rollouts, on two stages and with two replicas."""
    expected = update_of(room / "whole", REPLAYED_STEP + 1)
    command = (
        f"train.num_steps={REPLAYED_STEP + 1}",
        "evaluation.interval=0",
        "rollout.replay=whole",
        f"checkpoint.resume=whole/checkpoints/step_{REPLAYED_STEP:08d}",
    )
    layouts = {"pp2": PIPELINE, "dp2": "parallel.data_parallel_size=2"}
    runs = {name: start(room, *train(name, *command, option)) for name, option in layouts.items()}
    for name, process in runs.items():
        code, _, err = finish(process)
        assert code == 0, err
        found = update_of(room / name, REPLAYED_STEP + 1)
        for metric in ("actor/pg_loss", "actor/grad_norm"):
            assert found[metric] == pytest.approx(expected[metric], rel=1e-5), (name, metric)
        # The run directory was new: the metrics until here came out of the checkpoint.
        history = without_times(metrics_of(room / name))[:-1]
        whole = without_times(metrics_of(room / "whole"))
        assert history == [line for line in whole if line["step"] <= REPLAYED_STEP]


def test_a_save_that_fails_stops_the_run(room: Path) -> None:
    """Files may not grow to the size of a checkpoint, on either process; the next step is none."""
    process = start(room, *train("full", *WHOLE, PIPELINE, "checkpoint.interval=2"))
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    code, _, err = finish(process)
    assert code == 1, err
    failure = r"step_00000002: could not be saved: rank 0: .*__0_0.distcp: .*; rank 1: .*__1_0"
    assert re.search(failure, err), err
    assert names(room / "full") == [f".partial_step_00000002.{token(room / 'full')}"]
    recorded = [line["step"] for line in metrics_of(room / "full")]
    assert max(recorded) in (2, 3)


def token(run_dir: Path) -> str:
    """What tells the owner of a run directory from all others."""
    return json.loads((run_dir / "incarnation.json").read_text())["token"]


def test_the_older_of_two_starts_gives_way(room: Path) -> None:
    command = train("contested", "train.num_steps=100000", "evaluation.interval=0")
    run_dir = room / "contested"
    older = start(room, *command)
    wait_until(older, lambda: len(metrics_of(run_dir)) > 3)
    newer = start(room, *command)
    code, _, err = finish(older)
    assert code == 1, err
    owner = f"contested now belongs to job .*process {newer.pid} on .*writes nothing more"
    assert re.search(owner, err)
    assert "Traceback" not in err
    assert not (run_dir / "requeue").exists()
    steps = len(metrics_of(run_dir))
    wait_until(newer, lambda: len(metrics_of(run_dir)) > steps + 3)
    newer.send_signal(signal.SIGTERM)
    code, _, err = finish(newer)
    assert code == 75, err
    assert resumed_at(err) > 0
    recorded = [line["step"] for line in metrics_of(run_dir) if "actor/lr" in line]
    assert recorded == list(range(1, len(recorded) + 1))
    assert (run_dir / "requeue").read_text() == f"step {len(recorded)}\n"
    assert not [name for name in names(run_dir) if name.startswith(".")]
