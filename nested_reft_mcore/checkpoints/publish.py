"""How a directory appears whole or not at all, also when the power fails."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

PARTIAL = ".partial_"
"""A directory of this prefix is being written, or was when its writer died."""
REMOVED = ".removed_"
"""A directory of this prefix is being removed, or was when its remover died."""


def partial_directory(final: Path, token: str = "") -> Path:
    """Where `final` is prepared; writers with different tokens keep out of each other's way."""
    return final.with_name(f"{PARTIAL}{final.name}{'.' if token else ''}{token}")


def publish(partial: Path, final: Path) -> None:
    """Give a finished directory its name; an older directory of that name goes.

    The files are the caller's to fsync. A kill in between leaves the old one, the new one or, for
    the instant between two renames, neither; never a mixture.
    """
    sync_directory(partial)
    former = set_aside(final) if final.exists() else None
    partial.rename(final)
    sync_directory(final.parent)
    if former is not None:
        shutil.rmtree(former)


def set_aside(directory: Path) -> Path:
    """Take a directory's name away, which is one step, so that it can be removed in many."""
    number = 0
    while (aside := directory.with_name(f"{REMOVED}{directory.name}.{number}")).exists():
        number += 1
    directory.rename(aside)
    return aside


def write_whole(path: Path, text: str) -> None:
    """Replace a small file in one step; it reaches the disk before this returns."""
    aside = path.with_name(f".{path.name}.partial")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Wait until the content of a file is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_directory(directory: Path) -> None:
    """Wait until the names in a directory are on the disk."""
    sync_file(directory)


def sync_tree(directory: Path) -> None:
    """`sync_file` for everything below `directory`, and for itself."""
    for path in directory.rglob("*"):
        if not path.is_symlink():
            sync_file(path)
    sync_directory(directory)
