"""Checkpoints that are not what they say, or more than data: refused, and nothing of them runs."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from model_cases import architecture, build

from nested_reft_mcore.checkpoints.manifest import (
    MANIFEST_FILE,
    file_names,
    hash_files,
    write_manifest,
)
from nested_reft_mcore.checkpoints.root import checkpoint_name, move_latest
from nested_reft_mcore.config.checkpoint_layout import LATEST_FILE
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore.checkpoint import load_checkpoint, load_weights, save_weights
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import Policy

PARALLEL = ParallelConfig()


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    ranks = RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "single")
    yield initialize_parallel(PARALLEL, ranks, seed=0)
    shutdown()


@pytest.fixture(scope="module")
def policy(context: ParallelContext) -> Policy:
    return build(PARALLEL, context)[0]


class Evil:
    """Runs a command where it is unpickled."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (self.command,)


@pytest.fixture(scope="module")
def saved(context: ParallelContext, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The root of one checkpoint, and one of weights alone."""
    root = tmp_path_factory.mktemp("saved")
    policy, optimizer = build(PARALLEL, context)
    saved = root / "run" / checkpoint_name(3)
    save_weights(policy, saved, optimizer=optimizer, state={"step": 3})
    move_latest(root / "run", 3)
    save_weights(policy, root / "weights")
    return root


def seal(directory: Path) -> None:
    """A manifest that holds for whatever is in the directory, as a liar would write it."""
    (directory / MANIFEST_FILE).unlink()
    write_manifest(directory, hash_files(directory, file_names(directory)))


def put_into(path: Path, bomb: Evil) -> None:
    """Put the pickle in the place of an object that a file of values holds."""
    index = pickle.loads((path.parent / ".metadata").read_bytes())  # noqa: S301
    places = {
        key.fqn: info
        for key, info in index.storage_data.items()
        if info.relative_path == path.name and "_extra_state" in key.fqn
    }
    assert places
    file = io.BytesIO()
    torch.save(bomb, file)
    content = bytearray(path.read_bytes())
    for info in places.values():
        info.offset, info.length = len(content), len(file.getvalue())
    path.write_bytes(content + file.getvalue())
    (path.parent / ".metadata").write_bytes(pickle.dumps(index))


def test_pickles_that_would_run_a_command_are_refused(
    saved: Path, policy: Policy, tmp_path: Path
) -> None:
    witness = tmp_path / "witness"
    bomb = Evil(f"touch {witness}")
    cases = {
        ".metadata": r"\.metadata: would import posix\.system",
        "common.pt": "common.pt: cannot be loaded: ",
        "__0_0.distcp": "__0_0.distcp: cannot be loaded: ",
    }
    for name, message in cases.items():
        directory = tmp_path / name
        shutil.copytree(saved / "weights", directory)
        if name == ".metadata":
            (directory / name).write_bytes(pickle.dumps(bomb))
        elif name == "common.pt":
            torch.save(bomb, directory / name)
        else:
            put_into(directory / name, bomb)
        seal(directory)
        with pytest.raises(UserError, match=message):
            load_weights(policy, directory)
        assert not witness.exists(), name
    # The bomb is one.
    torch.load(tmp_path / "common.pt" / "common.pt", weights_only=False)
    assert witness.exists()


def test_files_that_are_not_as_the_manifest_says_are_refused(
    saved: Path, policy: Policy, tmp_path: Path
) -> None:
    def missing(directory: Path) -> None:
        (directory / ".metadata").unlink()

    def torn(directory: Path) -> None:
        path = directory / "__0_0.distcp"
        path.write_bytes(path.read_bytes()[:-1])

    def added(directory: Path) -> None:
        (directory / "__9_0.distcp").touch()

    def unsealed(directory: Path) -> None:
        (directory / MANIFEST_FILE).unlink()

    cases = {
        missing: r"is broken: \.metadata: missing",
        torn: r"is broken: __0_0\.distcp: has \d+ bytes, the manifest says \d+",
        added: r"is broken: __9_0\.distcp: is not in the manifest",
        unsealed: r"is broken: manifest\.json: missing; the checkpoint is unfinished",
    }
    for harm, message in cases.items():
        directory = tmp_path / harm.__name__
        shutil.copytree(saved / "weights", directory)
        harm(directory)
        with pytest.raises(UserError, match=message):
            load_weights(policy, directory)


def test_a_torn_index_is_refused(saved: Path, policy: Policy, tmp_path: Path) -> None:
    directory = tmp_path / "torn"
    shutil.copytree(saved / "weights", directory)
    (directory / ".metadata").write_bytes(b"torn")
    seal(directory)
    with pytest.raises(UserError, match=r"\.metadata: broken: "):
        load_weights(policy, directory)


def test_a_root_without_a_usable_latest_is_refused(
    saved: Path, policy: Policy, tmp_path: Path
) -> None:
    root = tmp_path / "run"
    shutil.copytree(saved / "run", root)
    latest = root / LATEST_FILE
    for content, message in (
        ("step_00000009\n", "latest: names 'step_00000009', which has no architecture.json"),
        ("../run/step_00000003\n", "latest: expected the name of a directory beside it"),
        (None, "run: not a checkpoint; expected architecture.json, or latest naming"),
    ):
        latest.unlink()
        if content is not None:
            latest.write_text(content)
        with pytest.raises(UserError, match=message):
            load_weights(policy, root)


def test_another_architecture_is_refused(
    saved: Path, context: ParallelContext, tmp_path: Path
) -> None:
    other, optimizer = build(PARALLEL, context, architecture(ffn_hidden_size=64, num_layers=4))
    with pytest.raises(
        UserError, match="ffn_hidden_size=48, num_layers=8; this run's has ffn_hidden_size=64, num"
    ):
        load_checkpoint(other, optimizer, saved / "run")
    # A file that lies about what is beside it.
    directory = tmp_path / "liar"
    shutil.copytree(saved / "weights", directory)
    shape = json.loads((directory / "architecture.json").read_text()) | {"ffn_hidden_size": 64}
    (directory / "architecture.json").write_text(json.dumps(shape))
    seal(directory)
    liar, _ = build(PARALLEL, context, architecture(ffn_hidden_size=64))
    with pytest.raises(UserError, match=r"liar: cannot be loaded: .*Global shape mismatch"):
        load_weights(liar, directory)


def test_weights_alone_are_no_run_to_resume(saved: Path, context: ParallelContext) -> None:
    policy, optimizer = build(PARALLEL, context)
    with pytest.raises(UserError, match=r"weights only; start from it with `model\.checkpoint`"):
        load_checkpoint(policy, optimizer, saved / "weights")
