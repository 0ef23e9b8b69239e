"""Metrics of a run: `metrics.jsonl`, TensorBoard files and, if asked, Weights & Biases."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, SupportsFloat

from nested_reft_mcore.config.errors import UserError

if TYPE_CHECKING:
    from torch.utils.tensorboard.writer import SummaryWriter

METRICS_FILE = "metrics.jsonl"
"""Name of the metrics file in a run directory."""

Number = int | float | None
"""A metric as it is stored; None where the value was not finite."""

_log = logging.getLogger(__name__)


class Tracker:
    """Writes the metrics of one run; does nothing on any rank but 0.

    Each call of `log` appends one line to `metrics.jsonl`, a flat JSON object with `step`, `time`
    (seconds since 1970) and the metrics under their own names, and flushes it.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        is_main: bool = True,
        resume_step: int | None = None,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        config: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """Open the files in `run_dir`.

        `resume_step` is the last step that the resumed checkpoint contains: lines of later steps
        are dropped, since the run will write them again. None starts a new history and moves an
        old one aside. `config` is shown by Weights & Biases.

        Raises UserError where `wandb_project` is given and wandb is not installed.
        """
        self._is_main = is_main
        self._clock = clock
        self._tensorboard: SummaryWriter | None = None
        self._wandb: Any = None
        if not is_main:
            return
        directory = Path(run_dir)
        directory.mkdir(parents=True, exist_ok=True)
        if wandb_project is not None:
            self._wandb = _start_wandb(wandb_project, directory, resume_step, config)
        path = directory / METRICS_FILE
        if resume_step is None:
            _move_aside(path)
        else:
            _keep_until(path, resume_step)
        self._file = path.open("a", encoding="utf-8")
        if tensorboard:
            self._tensorboard = _open_tensorboard(directory / "tensorboard", resume_step)

    def log(
        self,
        step: int,
        metrics: Mapping[str, SupportsFloat],
        *,
        texts: Mapping[str, str] | None = None,
    ) -> None:
        """Record `metrics` (numbers, 0-dimensional arrays or tensors) of `step`.

        NaN and infinities become null in `metrics.jsonl`; TensorBoard and Weights & Biases get what
        is finite. `texts` stand in `metrics.jsonl` only: the others draw numbers. Raises TypeError
        where a value is not a number, ValueError where a name is `step` or `time`, OSError where
        `metrics.jsonl` cannot be written. TensorBoard files that cannot be written are given up
        with a warning.
        """
        if not self._is_main:
            return
        numbers = {name: _to_number(name, value) for name, value in metrics.items()}
        now = self._clock()
        line = json.dumps({"step": step, "time": now, **numbers, **(texts or {})}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        finite = {name: value for name, value in numbers.items() if value is not None}
        if self._tensorboard is not None:
            try:
                for name, value in finite.items():
                    self._tensorboard.add_scalar(name, value, step, walltime=now)
                self._tensorboard.flush()
            except OSError as error:
                _log.warning("TensorBoard: cannot be written: %s; going on without", error)
                self._tensorboard = None
        if self._wandb is not None:
            # The step is a metric of its own: W&B drops what arrives with a smaller step number.
            self._wandb.log({**finite, "step": step})

    def close(self) -> None:
        """Flush and close everything; later calls do nothing."""
        if not self._is_main or self._file.closed:
            return
        with suppress(OSError):
            # What did not fit when it was written does not fit now.
            self._file.close()
        if self._tensorboard is not None:
            with suppress(OSError):
                self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Number]]:
    """Numbers of a metrics file, or of the one in a run directory, in the order of writing.

    Texts are left out. A line that a killed run left unfinished is skipped. Raises UserError where
    there is no file.
    """
    file = Path(path)
    if file.is_dir():
        file = file / METRICS_FILE
    if not file.is_file():
        raise UserError(f"{file}: not found; expected the metrics of a run, one JSON object a line")
    return [
        {name: value for name, value in entry.items() if not isinstance(value, str)}
        for _, entry in whole_lines(file)
    ]


def _to_number(name: str, value: SupportsFloat) -> Number:
    if name in ("step", "time"):
        raise ValueError(f"a metric may not be called {name!r}: every line has that key")
    if isinstance(value, int):
        return int(value)
    if isinstance(value, str):
        raise TypeError(f"metric {name!r} is a string, {value!r}; expected a number")
    try:
        number = float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"metric {name!r} is not a number: {type(value).__name__}") from error
    return number if math.isfinite(number) else None


def whole_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Whole lines of a metrics file with what they say; anything else is left out."""
    # A crash of the machine may leave bytes that are not text.
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                yield line.rstrip("\n"), entry


def _keep_until(path: Path, last_step: int) -> None:
    """Drop torn lines and those of steps after `last_step`; all of the file changes, or nothing."""
    if not path.exists():
        return
    kept = [line for line, entry in whole_lines(path) if (entry["step"] or 0) <= last_step]
    aside = path.with_suffix(".partial")
    with aside.open("w", encoding="utf-8") as file:
        file.writelines(line + "\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


def _move_aside(path: Path) -> None:
    """Give an old history the first free name of `metrics.1.jsonl`, `metrics.2.jsonl`, ..."""
    if not path.exists():
        return
    number = 1
    while (aside := path.with_suffix(f".{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
    _log.info("%s was there already; it is now %s", path, aside.name)


def _open_tensorboard(directory: Path, resume_step: int | None) -> SummaryWriter:
    from torch.utils.tensorboard.writer import SummaryWriter

    # Events of dropped steps stay in their file; TensorBoard hides those from purge_step on.
    return SummaryWriter(
        str(directory), purge_step=None if resume_step is None else resume_step + 1
    )


def _start_wandb(
    project: str, directory: Path, resume_step: int | None, config: Mapping[str, Any] | None
) -> Any:
    try:
        import wandb
    except ImportError as error:
        raise UserError(
            "logging.wandb_project is set, but wandb is not installed; "
            "expected `pip install 'nested_reft_mcore[wandb]'`, or leave the option out"
        ) from error
    id_file = directory / "wandb_run_id"
    run_id = id_file.read_text().strip() if resume_step is not None and id_file.exists() else None
    run = wandb.init(
        project=project,
        name=directory.name,
        dir=str(directory),
        id=run_id,
        resume="allow" if run_id else None,
        config=dict(config or {}),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    id_file.write_text(f"{run.id}\n")
    return run
