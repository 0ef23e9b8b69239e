"""JSON lines that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.errors import UserError


def check_output_file(path: str | Path) -> None:
    """Refuse a path that no file can be written to.

    Raises:
        UserError: names the path and what is there.
    """
    target = Path(path).resolve()
    # Renaming onto a device would replace it.
    if target.exists() and not target.is_file():
        found = "a directory" if target.is_dir() else "no ordinary file"
        raise UserError(f"{path}: is {found}; expected a file to write")
    existing = next(parent for parent in target.parents if parent.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"{path}: cannot be written; {existing} is no directory to write to")


def write_json_lines(path: str | Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """Write a line for each of `lines`, aside first; `path` appears when all are there.

    Directories above it are made. If `lines` raises, what was there before stays.

    Raises:
        UserError: the file cannot be written.
        ValueError: a line holds what JSON cannot: NaN or infinity.
    """
    # A link stays a link: what it points to is replaced.
    target = Path(path).resolve()
    unfinished = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as file:
            for line in lines:
                file.write(encoder.encode(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(target)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error}") from error
    finally:
        unfinished.unlink(missing_ok=True)
