"""One process saves while it trains: what is saved, what fails, what is found again."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import build, forward_backward, training_batch

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.checkpoints.manifest import read_manifest, verify
from nested_reft_mcore.checkpoints.publish import partial_directory
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import CheckpointConfig, OptimizerConfig, ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.launch.incarnation import SupersededError
from nested_reft_mcore.mcore.checkpoint import begin_checkpoint, load_checkpoint
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.mcore.weights import initialize_weights
from nested_reft_mcore.training.saving import RunCheckpoints

PARALLEL = ParallelConfig()
FULL = LayerSkipPlan.full(8)
Trained = tuple[Policy, PolicyOptimizer]


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    ranks = RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "single")
    yield initialize_parallel(PARALLEL, ranks, seed=0)
    shutdown()


@pytest.fixture(scope="module")
def trained(context: ParallelContext) -> Trained:
    return build(PARALLEL, context, optimizer=OptimizerConfig(lr=1e-2))


def nothing(*_arguments: Any) -> None:
    return None


def checkpoints(
    root: Path, context: ParallelContext, check_owner: Any = nothing, **options: Any
) -> RunCheckpoints:
    config = CheckpointConfig(**options)
    return RunCheckpoints(root, config, context, token="mine", check_owner=check_owner)


def step(policy: Policy, optimizer: PolicyOptimizer) -> None:
    forward_backward(policy, optimizer, FULL, training_batch())
    assert optimizer.step().applied


def weights(policy: Policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.chunks[0].parameters()]


def save(own: RunCheckpoints, number: int, trained: Trained) -> None:
    own.start(number, *trained, {"note": number}, nothing)


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
def test_what_is_saved_is_what_was_there(
    context: ParallelContext, tmp_path: Path, distributed: bool
) -> None:
    """Weights and moments move after the beginning, before a byte is written."""
    config = OptimizerConfig(lr=1e-2, use_distributed_optimizer=distributed)
    policy, optimizer = build(PARALLEL, context, optimizer=config)
    step(policy, optimizer)
    before = weights(policy)
    partial = partial_directory(tmp_path / "saved")
    state = {"step": 1}
    writer = begin_checkpoint(policy, partial, optimizer=optimizer, state=state, snapshot=True)
    step(policy, optimizer)
    after = weights(policy)
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    writer.write()
    writer.publish(tmp_path / "saved", step=1)
    resumed, its_optimizer = build(PARALLEL, context, optimizer=config)
    initialize_weights(resumed, seed=99)
    load_checkpoint(resumed, its_optimizer, tmp_path / "saved")
    for found, expected in zip(weights(resumed), before, strict=True):
        assert torch.equal(found, expected)
    # The moments are those of the moment too.
    step(resumed, its_optimizer)
    for found, expected in zip(weights(resumed), after, strict=True):
        assert torch.equal(found, expected)


def test_one_save_is_in_flight_and_old_ones_go(
    context: ParallelContext, trained: Trained, tmp_path: Path
) -> None:
    own = checkpoints(tmp_path, context, keep_last=1, keep_every=4)
    (tmp_path / ".partial_step_00000009.dead").mkdir(parents=True)
    for number in range(3, 7):
        save(own, number, trained)
        assert own.has_unpublished
        # Beginning one has waited for the one before.
        assert own.newest == (number - 1 if number > 3 else None)
    own.finish()
    assert not own.has_unpublished
    assert own.newest == 6
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["latest", "step_00000004", "step_00000006"]
    assert (tmp_path / "latest").read_text() == "step_00000006\n"
    assert verify(tmp_path / "step_00000006", "checksums") == []
    metrics = own.metrics()
    num_bytes = read_manifest(tmp_path / "step_00000006").num_bytes
    assert metrics["checkpoint/bytes"] == num_bytes > 10**5
    assert 0 < metrics["checkpoint/stall_seconds"] <= metrics["checkpoint/save_seconds"]
    assert own.metrics() == {}


def test_a_save_that_fails_is_told(
    context: ParallelContext, trained: Trained, tmp_path: Path
) -> None:
    own = checkpoints(tmp_path, context)
    save(own, 1, trained)
    own.finish()

    def stand_in_the_way(directory: Path) -> None:
        (directory / "__0_0.distcp").mkdir()

    own.start(2, *trained, {}, stand_in_the_way)
    message = r"step_00000002: could not be saved: rank 0: .*__0_0.distcp: IsADirectoryError"
    with pytest.raises(RuntimeError, match=message):
        own.finish()
    assert own.find() == tmp_path / "step_00000001"


def test_nothing_is_published_in_a_directory_of_somebody_else(
    context: ParallelContext, trained: Trained, tmp_path: Path
) -> None:
    def lost() -> None:
        raise SupersededError("gone")

    own = checkpoints(tmp_path, context, lost)
    save(own, 1, trained)
    with pytest.raises(SupersededError):
        own.finish()
    (partial,) = tmp_path.iterdir()
    assert partial.name == ".partial_step_00000001.mine"
    assert not (partial / "manifest.json").exists()


def test_which_one_is_resumed(
    context: ParallelContext, trained: Trained, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own = checkpoints(tmp_path, context, keep_last=9)
    for number in (1, 2, 3, 4):
        save(own, number, trained)
    own.finish()
    paths = [tmp_path / f"step_{number:08d}" for number in range(5)]
    (paths[4] / "manifest.json").unlink()
    (paths[3] / "state.json").write_text("{}")
    (tmp_path / "latest").write_text("step_00000001\n")
    with caplog.at_level(logging.WARNING):
        assert own.find() == paths[2]
    told = [record.getMessage() for record in caplog.records]
    assert [re.sub(r"\d+ bytes.*", "", text) for text in told] == [
        f"PASSED OVER checkpoint {paths[4]}: manifest.json: missing; the checkpoint is unfinished, "
        "or was not written by this program",
        f"PASSED OVER checkpoint {paths[3]}: state.json: has ",
    ]
    assert checkpoints(tmp_path, context, resume="never").find() is None
    assert checkpoints(tmp_path, context, resume=str(paths[1])).find() == paths[1]
    for path in (tmp_path, paths[4]):
        with pytest.raises(UserError, match=r"step_00000004: is broken: manifest\.json: missing"):
            checkpoints(tmp_path, context, resume=str(path)).find()
    # A run that goes on from the second one has neither a third nor a fourth.
    own.begin(paths[2], 2)
    assert own.newest == 2
    names = sorted(path.name for path in tmp_path.iterdir())
    passed_over = [f"passed_over_step_0000000{number}.0" for number in (3, 4)]
    assert names == ["latest", *passed_over, "step_00000001", "step_00000002"]
    assert (tmp_path / "latest").read_text() == "step_00000002\n"
    fresh = checkpoints(tmp_path, context)
    fresh.begin(None, 0)
    assert fresh.newest is None
    assert fresh.find() is None
    assert not (tmp_path / "latest").exists()
