"""`manifest.json`: every file of a checkpoint with its size and SHA-256.

It is written last, so a directory without one is unfinished, whatever else it holds. SHA-256 is in
every Python's `hashlib`, which computes it with the CPU's own instructions (1-2 GB/s a core) and
without holding the interpreter, so it can run beside training; `sha256sum` checks it by hand.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from nested_reft_mcore.checkpoints.publish import write_whole
from nested_reft_mcore.config.errors import UserError

MANIFEST_FILE = "manifest.json"
FORMAT = 1
"""Raised when a reader of the former version could not read a new checkpoint."""
Level = Literal["sizes", "checksums"]
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file of a checkpoint."""

    name: str
    """Path below the checkpoint, with forward slashes."""
    num_bytes: int
    sha256: str
    """Lower-case hexadecimal."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of."""

    files: tuple[FileEntry, ...]
    """Sorted by name; the manifest itself is not among them."""
    step: int | None = None
    """Steps that are done; absent where weights only were converted."""

    @property
    def num_bytes(self) -> int:
        """Size of the whole checkpoint, manifest left out."""
        return sum(entry.num_bytes for entry in self.files)


def hash_files(directory: Path, names: Iterable[str]) -> list[FileEntry]:
    """Size and SHA-256 of files below `directory`, by their paths with forward slashes.

    Reads every byte. Raises OSError.
    """
    return [_hash_file(directory, name) for name in names]


def file_names(directory: Path) -> list[str]:
    """All files below `directory` but the manifest, as a manifest names them, sorted.

    A file that NFS keeps because a process still has it open (`.nfs...`) is nobody's.
    """
    paths = (path for path in directory.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted(
        path.relative_to(directory).as_posix()
        for path in paths
        if path != directory / MANIFEST_FILE and not path.name.startswith(".nfs")
    )


def write_manifest(
    directory: Path, entries: Sequence[FileEntry], *, step: int | None = None
) -> Manifest:
    """Write the manifest of a checkpoint whose other files are all there; one process calls it.

    The manifest reaches the disk before this returns; the files are the caller's to fsync
    (`publish.sync_tree`).

    Raises:
        ValueError: `entries` are not the files of the directory, or differ from them in size.
    """
    manifest = Manifest(tuple(sorted(entries, key=lambda entry: entry.name)), step)
    problems = _unlisted(directory, manifest)
    problems += [problem for entry in manifest.files if (problem := _wrong_size(directory, entry))]
    if len({entry.name for entry in manifest.files}) != len(manifest.files):
        problems.append("a file is listed twice")
    if problems:
        raise ValueError(f"{directory}: {problems[0]}")
    content = {
        "format": FORMAT,
        "step": step,
        "files": {
            entry.name: {"bytes": entry.num_bytes, "sha256": entry.sha256}
            for entry in manifest.files
        },
    }
    write_whole(directory / MANIFEST_FILE, json.dumps(content, indent=1) + "\n")
    return manifest


def read_manifest(directory: Path) -> Manifest:
    """What the checkpoint says of itself.

    Raises:
        UserError: there is no manifest, or it cannot be understood.
    """
    path = directory / MANIFEST_FILE
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path}: missing; the checkpoint is unfinished, or was not written by this program"
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not readable as JSON: {error}") from None
    found = content.get("format") if isinstance(content, dict) else None
    if found != FORMAT:
        raise UserError(f"{path}: format is {found!r}; this version reads format {FORMAT}")
    try:
        files = tuple(_entry(name, value) for name, value in content["files"].items())
        step = content["step"]
        if step is not None and not isinstance(step, int):
            raise ValueError(f"step is {step!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path}: not a manifest: {error!r}") from None
    return Manifest(files, step)


def verify(directory: Path, level: Level, share: tuple[int, int] = (0, 1)) -> list[str]:
    """What is wrong with a checkpoint: missing, misshapen, changed and unlisted files.

    Args:
        directory: The checkpoint.
        level: `sizes` asks the file system only, `checksums` reads every byte as well.
        share: (rank, size): look at this part of the files only. Over all ranks of the size every
            file is looked at once, about as many bytes by each.

    Returns:
        A sentence for each problem, which starts with the name of the file; nothing if all is well.
    """
    try:
        manifest = read_manifest(directory)
    except UserError as error:
        return [str(error).removeprefix(f"{directory}{os.sep}")]
    rank, size = share
    problems = _unlisted(directory, manifest) if rank == 0 else []
    for entry in _share_out(manifest.files, size)[rank]:
        problem = _wrong_size(directory, entry)
        if problem is None and level == "checksums":
            problem = _wrong_content(directory, entry)
        if problem is not None:
            problems.append(problem)
    return problems


def _hash_file(directory: Path, name: str) -> FileEntry:
    digest, num_bytes = hashlib.sha256(), 0
    block = memoryview(bytearray(_BLOCK_BYTES))
    with (directory / name).open("rb", buffering=0) as file:
        while count := file.readinto(block):
            digest.update(block[:count])
            num_bytes += count
    return FileEntry(name, num_bytes, digest.hexdigest())


def _entry(name: str, value: Any) -> FileEntry:
    path = PurePosixPath(name)
    if not name or path.is_absolute() or ".." in path.parts or path.as_posix() != name:
        raise ValueError(f"{name!r} is not a path below the checkpoint")
    entry = FileEntry(name, value["bytes"], value["sha256"])
    if not isinstance(entry.num_bytes, int) or not isinstance(entry.sha256, str):
        raise TypeError(f"{name}: expected a size and a checksum, found {value!r}")
    return entry


def _unlisted(directory: Path, manifest: Manifest) -> list[str]:
    listed = {entry.name for entry in manifest.files}
    return [
        f"{name}: is not in the manifest" for name in file_names(directory) if name not in listed
    ]


def _wrong_size(directory: Path, entry: FileEntry) -> str | None:
    path = directory / entry.name
    try:
        found = path.stat().st_size
    except FileNotFoundError:
        return f"{entry.name}: missing"
    except OSError as error:
        return f"{entry.name}: {error.strerror}"
    if not path.is_file():
        return f"{entry.name}: is not a file"
    if found != entry.num_bytes:
        return f"{entry.name}: has {found} bytes, the manifest says {entry.num_bytes}"
    return None


def _wrong_content(directory: Path, entry: FileEntry) -> str | None:
    try:
        found = _hash_file(directory, entry.name).sha256
    except OSError as error:
        return f"{entry.name}: {error.strerror}"
    if found == entry.sha256:
        return None
    return f"{entry.name}: has checksum {found[:12]}, the manifest says {entry.sha256[:12]}"


def _share_out(files: Sequence[FileEntry], size: int) -> list[list[FileEntry]]:
    """The largest file first, each to whoever has least; the same answer everywhere."""
    shares: list[list[FileEntry]] = [[] for _ in range(size)]
    load = [0] * size
    for entry in sorted(files, key=lambda entry: (-entry.num_bytes, entry.name)):
        rank = load.index(min(load))
        shares[rank].append(entry)
        load[rank] += entry.num_bytes + 1
    return shares
