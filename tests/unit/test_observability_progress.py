"""The display shows what a person follows, as a bar on a terminal and as lines elsewhere."""

import io
import logging
import sys

import pytest

from nested_reft_mcore.observability.progress import Progress

METRICS = {
    "critic/rewards/mean": 0.4375,
    "perf/throughput": 1234.5,
    "nested/num_skipped": 2,
    "nested/ess": 0.91,
    "actor/lr": 1e-4,
}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def ticking(seconds: float):
    now = iter(range(1000))
    return lambda: next(now) * seconds


def test_plain_line_holds_everything():
    stream = io.StringIO()
    with Progress("auto", 10, stream=stream, clock=ticking(60)) as progress:
        progress.update(1, METRICS, skipped="3,7")
    (line,) = stream.getvalue().splitlines()
    assert line == "train 1/10  reward 0.438  tokens/s 1,234  ess 0.91  skips 3,7  left 0:09:00"


def test_time_left_counts_only_steps_of_this_part_of_the_run():
    stream = io.StringIO()
    with Progress("plain", 100, start_step=90, stream=stream, clock=ticking(3600)) as progress:
        progress.update(92, {})
        progress.update(100, {})
    assert stream.getvalue().splitlines() == ["train 92/100  left 4:00:00", "train 100/100"]


@pytest.mark.parametrize(
    ("metrics", "skipped", "expected"),
    [
        ({"nested/num_skipped": 2.0}, None, "skips 2"),
        ({"nested/num_skipped": 0}, "none", "skips none"),
        ({}, "5.mlp", "skips 5.mlp"),
        ({"rollout_corr/rollout_is_eff_sample_size": 0.5}, None, "ess 0.50"),
        ({"sft/loss": 1.25}, None, "loss 1.250"),
        ({"critic/rewards/mean": float("nan")}, None, "reward nan"),
    ],
)
def test_parts_of_a_line(metrics, skipped, expected):
    stream = io.StringIO()
    with Progress("plain", 1, stream=stream) as progress:
        progress.update(1, metrics, skipped=skipped)
    assert stream.getvalue() == f"train 1/1  {expected}\n"


def test_terminal_gets_a_bar():
    stream = Terminal()
    with Progress("auto", 4, title="sft", stream=stream) as progress:
        progress.update(3, METRICS)
    shown = stream.getvalue()
    assert "3/4" in shown
    assert "reward 0.438" in shown
    assert "\x1b[" in shown


def test_bar_leaves_log_messages_whole(monkeypatch: pytest.MonkeyPatch):
    from nested_reft_mcore.observability.logging import _ConsoleHandler

    monkeypatch.setattr(sys, "stderr", io.StringIO())
    stream = Terminal()
    handler = _ConsoleHandler()
    with Progress("bar", 4, stream=stream) as progress:
        progress.update(1, METRICS)
        handler.emit(logging.makeLogRecord({"msg": "checkpoint saved"}))
    # Printed by the display, above the bar, so on a line of its own.
    assert any("checkpoint saved" in line for line in stream.getvalue().splitlines())


def test_off_shows_nothing():
    stream = Terminal()
    with Progress("off", 4, stream=stream) as progress:
        progress.update(1, METRICS)
    assert stream.getvalue() == ""


def test_display_ends_also_when_the_run_fails():
    stream = Terminal()

    def failing() -> None:
        with Progress("bar", 4, stream=stream):
            raise RuntimeError("lost")

    with pytest.raises(RuntimeError, match="lost"):
        failing()
    assert stream.getvalue().count("\x1b[?25l") == stream.getvalue().count("\x1b[?25h") == 1
