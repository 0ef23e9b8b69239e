"""The manifest of a checkpoint: what it lists, what it finds, and how the work is shared out."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from nested_reft_mcore.checkpoints.manifest import (
    MANIFEST_FILE,
    file_names,
    hash_files,
    read_manifest,
    verify,
    write_manifest,
)
from nested_reft_mcore.config.errors import UserError

CONTENTS = {"__0_0.distcp": b"0" * 5000, "__1_0.distcp": b"1" * 3000, "tokenizer/a.json": b"{}"}


@pytest.fixture
def sealed(tmp_path: Path) -> Path:
    directory = tmp_path / "step_00000004"
    for name, content in CONTENTS.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    write_manifest(directory, hash_files(directory, file_names(directory)), step=4)
    return directory


def test_lists_every_file_as_sha256sum_does(sealed: Path) -> None:
    manifest = read_manifest(sealed)
    assert manifest.step == 4
    assert manifest.num_bytes == 8002
    found = {entry.name: (entry.num_bytes, entry.sha256) for entry in manifest.files}
    expected = {n: (len(c), hashlib.sha256(c).hexdigest()) for n, c in CONTENTS.items()}
    assert found == expected
    assert verify(sealed, "checksums") == []


def test_finds_what_is_wrong(sealed: Path) -> None:
    (sealed / "__0_0.distcp").write_bytes(b"0" * 4999 + b"1")
    assert verify(sealed, "sizes") == []
    (problem,) = verify(sealed, "checksums")
    assert problem.startswith("__0_0.distcp: has checksum ")
    (sealed / "__1_0.distcp").write_bytes(b"1")
    (sealed / "tokenizer" / "a.json").unlink()
    (sealed / "more").touch()
    (sealed / ".nfs0001").touch()
    assert verify(sealed, "sizes") == [
        "more: is not in the manifest",
        "__1_0.distcp: has 1 bytes, the manifest says 3000",
        "tokenizer/a.json: missing",
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_ranks_look_at_every_file_once(sealed: Path, size: int) -> None:
    for name, content in CONTENTS.items():
        (sealed / name).write_bytes(b"x" * len(content))
    (sealed / "more").touch()
    found = [p for rank in range(size) for p in verify(sealed, "checksums", (rank, size))]
    assert sorted(problem.partition(":")[0] for problem in found) == sorted([*CONTENTS, "more"])


def test_two_ranks_read_about_as_much(sealed: Path) -> None:
    for name in CONTENTS:
        (sealed / name).write_bytes(b"x" * len(CONTENTS[name]))
    shares = [verify(sealed, "checksums", (rank, 2)) for rank in range(2)]
    assert [len(share) for share in shares] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "manifest.json: missing; the checkpoint is unfinished"),
        ("{", "manifest.json: not readable as JSON"),
        ("[]", "manifest.json: format is None; this version reads format 1"),
        ('{"format": 2}', "manifest.json: format is 2; this version reads format 1"),
        ('{"format": 1, "step": 1}', "manifest.json: not a manifest: KeyError"),
        ('{"format": 1, "step": 1, "files": {"a": 3}}', "manifest.json: not a manifest"),
    ],
)
def test_a_manifest_that_says_nothing_is_a_problem(
    sealed: Path, content: str | None, message: str
) -> None:
    (sealed / MANIFEST_FILE).unlink()
    if content is not None:
        (sealed / MANIFEST_FILE).write_text(content)
    (problem,) = verify(sealed, "sizes")
    assert problem.startswith(message)
    with pytest.raises(UserError, match=message.partition(":")[0]):
        read_manifest(sealed)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "", "a/../../b", "a//b"])
def test_paths_that_leave_the_checkpoint_are_refused(sealed: Path, name: str) -> None:
    content = json.loads((sealed / MANIFEST_FILE).read_text())
    content["files"][name] = {"bytes": 1, "sha256": "0"}
    (sealed / MANIFEST_FILE).write_text(json.dumps(content))
    with pytest.raises(UserError, match="is not a path below the checkpoint"):
        read_manifest(sealed)


def test_a_file_that_nobody_hashed_is_no_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    entries = hash_files(tmp_path, ["a"])
    (tmp_path / "b").touch()
    with pytest.raises(ValueError, match="b: is not in the manifest"):
        write_manifest(tmp_path, entries)
    (tmp_path / "b").unlink()
    with pytest.raises(ValueError, match="listed twice"):
        write_manifest(tmp_path, entries * 2)
    (tmp_path / "a").write_text("aa")
    with pytest.raises(ValueError, match="a: has 2 bytes"):
        write_manifest(tmp_path, entries)
    assert not (tmp_path / MANIFEST_FILE).exists()
