"""What an evaluation has completed so far, kept so that a killed one goes on.

Beside the figures lies a directory of parts: `settings.json`, and a file of JSON lines for each
replica of each start, to which a completion is added as soon as it ends. Rewards are not in it:
judging is quick, and done again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from nested_reft_mcore.checkpoints.publish import write_whole
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.rollout.types import FinishReason

SETTINGS_FILE = "settings.json"
Mode = Literal["greedy", "sampled"]


@dataclass(frozen=True)
class Task:
    """One way of completing every prompt."""

    policy: str
    """What is skipped, as a plan describes itself, or `full`."""
    mode: Mode


@dataclass(frozen=True)
class RawCompletion:
    """A completion, not judged yet."""

    policy: str
    mode: Mode
    dataset: str
    row: int
    """Place of the prompt in its set, from 0."""
    sample: int
    """Place among the prompt's completions, from 0."""
    token_ids: tuple[int, ...]
    finish_reason: FinishReason

    @property
    def task(self) -> Task:
        """What it belongs to."""
        return Task(self.policy, self.mode)


class Parts:
    """The directory of parts of one evaluation."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def begin(self, settings: Mapping[str, Any], *, restart: bool) -> list[RawCompletion]:
        """Make the directory, or take over what is in it; the completions of earlier starts.

        Only one process calls it. `restart` throws away what is there.

        Raises:
            UserError: what is there was made with other settings, or is no evaluation.
        """
        path = self.directory / SETTINGS_FILE
        if restart and self.directory.exists():
            if not path.exists():
                raise UserError(
                    f"{self.directory}: has no {SETTINGS_FILE}, so it is no evaluation; not removed"
                )
            shutil.rmtree(self.directory)
        if path.exists():
            check_same_settings(read_object(path), settings, path)
            return sorted(self._read(), key=lambda one: (one.dataset, one.row, one.sample))
        self.directory.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=1, ensure_ascii=False) + "\n")
        return []

    def open(self, replica: int) -> PartWriter:
        """A new file for what a replica completes from now on."""
        numbers = (int(path.stem.split("_")[1]) for path in self._files(replica))
        start = 1 + max(numbers, default=-1)
        return PartWriter(self.directory / f"start_{start:03d}_replica_{replica:04d}.jsonl")

    def remove(self) -> None:
        """Throw the parts away; the evaluation is written elsewhere."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def _files(self, replica: int | None = None) -> list[Path]:
        which = "*" if replica is None else f"{replica:04d}"
        return sorted(self.directory.glob(f"start_*_replica_{which}.jsonl"))

    def _read(self) -> Iterator[RawCompletion]:
        """Every whole line, once. The last line of a killed process may be torn."""
        seen: set[tuple[Task, str, int, int]] = set()
        for path in self._files():
            for line in path.read_bytes().splitlines(keepends=True):
                found = _parse(line)
                if found is not None:
                    key = (found.task, found.dataset, found.row, found.sample)
                    if key not in seen:
                        seen.add(key)
                        yield found


class PartWriter:
    """Adds completions to a part, each in the hands of the system when `add` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: IO[str] | None = None

    def add(self, completion: RawCompletion) -> None:
        """Write a line. OSError where that is impossible."""
        if self._file is None:
            self._file = self._path.open("x", encoding="utf-8")
        self._file.write(json.dumps(asdict(completion)) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Nothing follows."""
        if self._file is not None:
            self._file.close()


def check_same_settings(found: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Refuse to go on with what was made with other settings.

    Raises:
        UserError: names each setting that differs, with both values.
    """
    before, now = dict(_leaves(found)), dict(_leaves(wanted))
    differing = [
        f"{key} was {before.get(key, 'absent')}, is {now.get(key, 'absent')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if differing:
        shown = "; ".join(differing[:5]) + ("; ..." if len(differing) > 5 else "")
        raise UserError(
            f"{path}: belongs to an evaluation with other settings: {shown}. Write this one "
            "elsewhere (--output FILE), or throw the other away (--restart)"
        )


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file that an evaluation has written.

    Raises:
        UserError: it holds something else.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object as `evaluate` writes it")
    return content


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every value below an object, as JSON, by its dotted key."""
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, json.dumps(value, ensure_ascii=False)


def _parse(line: bytes) -> RawCompletion | None:
    if not line.endswith(b"\n"):
        return None
    try:
        fields = json.loads(line)
        return RawCompletion(**{**fields, "token_ids": tuple(fields["token_ids"])})
    except (ValueError, TypeError, KeyError):
        return None
