"""A directory that a tool writes: checked beforehand, prepared aside, then put in its place."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nested_reft_mcore.checkpoints.publish import partial_directory, publish
from nested_reft_mcore.config.errors import UserError

_SPARE_BYTES = 16 * 10**6
"""Room for configs, tokenizer and index beside the weights."""


def check_output_is_free(output: Path, *, marker: str, kind: str, force: bool) -> None:
    """Refuse to write over what is there.

    Args:
        output: Directory to write.
        marker: File by which a directory of this kind is known.
        kind: What such directories are called, for the message.
        force: Allow to replace a directory of this kind.

    Raises:
        UserError: `output` is a file, or a directory that is not empty; with `force`, only if it
            has no `marker`, because nobody meant to replace that.
    """
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: expected a directory to write to, found a file")
    if not any(output.iterdir()):
        return
    if not force:
        raise UserError(f"{output}: is not empty; choose another directory or use --force")
    if not (output / marker).is_file():
        raise UserError(f"{output}: --force replaces {kind} only, and this one has no {marker}")


def check_room(output: Path, num_bytes: int) -> None:
    """Refuse to start what cannot be written. What `output` holds now stays until the end.

    Raises:
        UserError: there is no permission, or not enough space: says how much is needed and free.
    """
    existing = next(parent for parent in output.resolve().parents if parent.exists())
    if not os.access(existing, os.W_OK | os.X_OK, effective_ids=True):
        raise UserError(f"{output}: no permission to write to {existing}")
    free = shutil.disk_usage(existing).free
    needed = num_bytes + _SPARE_BYTES
    if free < needed:
        raise UserError(
            f"{output}: needs {needed / 1e9:.2f} GB, but {existing} has {free / 1e9:.2f} GB free; "
            f"free {(needed - free) / 1e9:.2f} GB or choose another disk"
        )


@contextmanager
def staged_directory(output: Path) -> Iterator[Path]:
    """Give a new directory beside `output`; it takes the name of `output` if all goes well.

    A directory that is there is replaced at that moment; after an error it is as it was.

    Raises:
        UserError: the directory cannot be made here, or a file in it cannot be written.
    """
    output = output.resolve()
    partial = partial_directory(output, secrets.token_hex(4))
    try:
        try:
            partial.mkdir(parents=True)
            yield partial
            publish(partial, output)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        raise unwritable(output, error) from error


def unwritable(output: Path, error: OSError) -> UserError:
    """What to raise where the system refuses to write a directory or a file in it."""
    where = f" ({error.filename})" if error.filename else ""
    return UserError(f"{output}: cannot be written: {error.strerror}{where}")
