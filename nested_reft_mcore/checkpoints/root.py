"""The directory of a run's checkpoints: `step_00000040` and so on, and the hint `latest`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from nested_reft_mcore.checkpoints.publish import PARTIAL, REMOVED, sync_directory, write_whole
from nested_reft_mcore.config.checkpoint_layout import LATEST_FILE

_NAME = re.compile(r"step_(\d{8,})")


def checkpoint_name(step: int) -> str:
    """Name of the checkpoint after `step` steps."""
    return f"step_{step:08d}"


def list_checkpoints(root: Path) -> dict[int, Path]:
    """The checkpoints of a root by step, oldest first. A name is no proof that one is whole."""
    if not root.is_dir():
        return {}
    matches = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    found = {int(match.group(1)): path for match, path in matches if match and path.is_dir()}
    return dict(sorted(found.items()))


def outdated(steps: Sequence[int], keep_last: int, keep_every: int) -> list[int]:
    """The steps whose checkpoints may go: not among the newest, nor a multiple of `keep_every`."""
    older = sorted(steps)[:-keep_last]
    return [step for step in older if not keep_every or step % keep_every]


def move_latest(root: Path, step: int) -> None:
    """Point `latest` at a checkpoint: for people and tools, resuming does not trust it."""
    write_whole(root / LATEST_FILE, checkpoint_name(step) + "\n")


def leftovers(root: Path) -> list[Path]:
    """What killed saves and removals have left."""
    return [path for prefix in (PARTIAL, REMOVED) for path in root.glob(f"{prefix}*")]


def pass_over(checkpoint: Path) -> Path:
    """Take a checkpoint out of the run's history, for a person to look at; returns where it is."""
    number = 0
    while (aside := checkpoint.with_name(f"passed_over_{checkpoint.name}.{number}")).exists():
        number += 1
    checkpoint.rename(aside)
    sync_directory(checkpoint.parent)
    return aside
