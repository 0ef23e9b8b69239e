"""Where things lie in a checkpoint directory, as far as one can tell without torch.

A checkpoint root holds one directory per checkpoint and a text file `latest` that names the newest;
a single checkpoint holds `architecture.json`, the plain fields of `ModelArchitecture`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import section_from_dict

ARCHITECTURE_FILE = "architecture.json"
LATEST_FILE = "latest"
STATE_FILE = "state.json"
"""Step, data position and whatever else a run wants back; empty beside weights alone."""


def resolve_checkpoint(path: str | Path) -> Path:
    """The directory of one checkpoint: `path` itself, or what `path/latest` names.

    Raises:
        UserError: `path` is neither a checkpoint nor a root of some, or `latest` points nowhere.
    """
    root = Path(path)
    if not root.is_dir():
        found = "is a file" if root.exists() else "does not exist"
        raise UserError(f"{root}: {found}; expected a checkpoint directory")
    if (root / ARCHITECTURE_FILE).is_file():
        return root
    latest = root / LATEST_FILE
    if not latest.is_file():
        raise UserError(
            f"{root}: not a checkpoint; expected {ARCHITECTURE_FILE}, or {LATEST_FILE} naming a "
            "directory that has it"
        )
    name = latest.read_text(encoding="utf-8", errors="replace").strip()
    if not name or Path(name).name != name or name in (".", ".."):
        raise UserError(f"{latest}: expected the name of a directory beside it, got {name!r}")
    if not (root / name / ARCHITECTURE_FILE).is_file():
        raise UserError(f"{latest}: names {name!r}, which has no {ARCHITECTURE_FILE}")
    return root / name


def read_checkpoint_architecture(path: str | Path) -> ModelArchitecture:
    """The architecture of the checkpoint at `path` or of the newest one below it.

    Raises:
        UserError: there is none, or its `architecture.json` is broken.
    """
    file = resolve_checkpoint(path) / ARCHITECTURE_FILE
    try:
        data: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise UserError(f"{file}: expected an object, got {type(data).__name__}")
    return section_from_dict(ModelArchitecture, cast(dict[str, Any], data), str(file))


def write_architecture(directory: Path, architecture: ModelArchitecture) -> None:
    """Write what `read_checkpoint_architecture` reads."""
    text = architecture.model_dump_json(indent=2) + "\n"
    (directory / ARCHITECTURE_FILE).write_text(text, encoding="utf-8")
