"""What a person sees while a run goes on: a live bar on a terminal, a line a step elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Literal, SupportsFloat, TextIO

import rich.progress
from rich.console import Console

_log = logging.getLogger(__name__)

ProgressMode = Literal["auto", "bar", "plain", "off"]

# Label, names of which the first one present is shown, format.
_COLUMNS: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("loss", ("sft/loss",), "{:.3f}"),
    ("reward", ("critic/rewards/mean",), "{:.3f}"),
    ("tokens/s", ("perf/generated_tokens_per_second", "perf/throughput"), "{:,.0f}"),
    ("ess", ("nested/ess", "rollout_corr/rollout_is_eff_sample_size"), "{:.2f}"),
)


class Progress:
    """Reward, tokens/s, skipped layers, effective sample size and time left, step by step.

    Use as a context manager; `update` once a step. Only rank 0 should show one: give the others
    `mode="off"`.
    """

    def __init__(
        self,
        mode: ProgressMode,
        num_steps: int,
        *,
        start_step: int = 0,
        title: str = "train",
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`num_steps` in all, of which `start_step` were done by an earlier part of the run."""
        self._stream = stream or sys.stdout
        self._mode = mode
        if mode == "auto":
            self._mode = "bar" if self._stream.isatty() else "plain"
        self._num_steps = num_steps
        self._start_step = start_step
        self._title = title
        self._clock = clock
        self._started = clock()
        self._bar: rich.progress.Progress | None = None
        self._task = rich.progress.TaskID(0)

    def update(
        self,
        num_done: int,
        metrics: Mapping[str, SupportsFloat],
        *,
        skipped: str | None = None,
    ) -> None:
        """Show that `num_done` of the run's steps are done, with `metrics` of the last one.

        `skipped` are the layers that its behavior policy left out, as a plan describes itself:
        `3,5.attention`.
        """
        if self._mode == "off":
            return
        try:
            self._show(num_done, metrics, skipped)
        except OSError as error:
            _log.warning("progress cannot be shown: %s; going on without", error.strerror)
            self._mode, self._bar = "off", None

    def _show(
        self, num_done: int, metrics: Mapping[str, SupportsFloat], skipped: str | None
    ) -> None:
        text = _describe(metrics, skipped)
        if self._bar is not None:
            self._bar.update(
                self._task, completed=num_done, text=text, left=self._time_left(num_done)
            )
        elif self._mode == "plain":
            left = self._time_left(num_done)
            count = f"{self._title} {num_done}/{self._num_steps}"
            print("  ".join(part for part in (count, text, left) if part), file=self._stream)
            self._stream.flush()

    def _time_left(self, num_done: int) -> str:
        """Mean time of the steps done here times the steps that remain, as `left 1:02:03`."""
        done_here = num_done - self._start_step
        remaining = self._num_steps - num_done
        if done_here <= 0 or remaining <= 0:
            return ""
        seconds = round((self._clock() - self._started) / done_here * remaining)
        hours, minutes = divmod(seconds // 60, 60)
        return f"left {hours}:{minutes:02}:{seconds % 60:02}"

    def __enter__(self) -> Progress:
        self._started = self._clock()
        if self._mode == "bar":
            self._bar = rich.progress.Progress(
                rich.progress.TextColumn("{task.description}"),
                rich.progress.BarColumn(bar_width=24),
                rich.progress.MofNCompleteColumn(),
                rich.progress.TextColumn("{task.fields[text]}"),
                rich.progress.TextColumn("{task.fields[left]}", style="dim"),
                console=Console(file=self._stream),
            )
            self._task = self._bar.add_task(
                self._title, total=self._num_steps, completed=self._start_step, text="", left=""
            )
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _describe(metrics: Mapping[str, SupportsFloat], skipped: str | None) -> str:
    """The metrics that a person follows, as far as they are there."""
    parts: list[str] = []
    for label, names, form in _COLUMNS:
        name = next((one for one in names if one in metrics), None)
        if name is not None:
            parts.append(f"{label} {form.format(float(metrics[name]))}")
    if skipped is not None:
        parts.append(f"skips {skipped}")
    elif "nested/num_skipped" in metrics:
        parts.append(f"skips {float(metrics['nested/num_skipped']):g}")
    return "  ".join(parts)
