"""`metrics.jsonl`, TensorBoard and Weights & Biases (offline) hold the same numbers."""

import math
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nested_reft_mcore.observability.tracking import Tracker, read_metrics

STEPS = {
    1: {"critic/rewards/mean": 0.25, "rollout_corr/kl": 1e-3, "actor/grad_norm": math.nan},
    2: {"critic/rewards/mean": 0.5, "rollout_corr/kl": 2e-3, "actor/grad_norm": 1.5},
    3: {"val-core/eval/reward/mean@4": 0.125, "reward/timeouts": 2},
}
Metrics = dict[str, dict[int, float]]


def write(run_dir: Path, wandb_project: str | None = None) -> None:
    with Tracker(run_dir, wandb_project=wandb_project, config={"seed": 3}) as tracker:
        for step, metrics in STEPS.items():
            tracker.log(step, metrics, texts={"nested/plan": "1,3"})
        # A save that is timed after its step's line.
        tracker.log(3, {"timing_s/save_checkpoint": 0.5})


def of_jsonl(run_dir: Path) -> Metrics:
    found: Metrics = {}
    for line in read_metrics(run_dir):
        for name, value in line.items():
            if value is not None and name not in ("step", "time"):
                found.setdefault(name, {})[int(line["step"] or 0)] = value
    return found


def of_tensorboard(run_dir: Path) -> Metrics:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }


def records_of(log: bytes) -> Iterator[bytes]:
    """Records of a `.wandb` file: 7 bytes of its own, then LevelDB's log format.

    Blocks of 32 KiB; a piece is checksum, length, type (1 whole, 2 first, 3 middle, 4 last), data.
    """
    place, whole = 7, b""
    while place + 7 <= len(log):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", log, place)
        place += 7 + length
        if place > len(log):
            return
        whole += log[place - length : place]
        if kind in (1, 4):
            yield whole
            whole = b""


def of_wandb(path: Path) -> list[Any]:
    """All records of a finished run, which wandb's own process may write after `finish` returns."""
    from wandb.proto import wandb_internal_pb2 as protocol

    # Made when imported, which no type checker sees.
    record_type: Any = vars(protocol)["Record"]

    for _ in range(100):
        records = [record_type.FromString(data) for data in records_of(path.read_bytes())]
        if records and records[-1].WhichOneof("record_type") == "exit":
            return records
        time.sleep(0.1)
    raise AssertionError(f"{path}: no record of its end")


def test_tensorboard_holds_the_metrics_and_no_others(tmp_path: Path):
    write(tmp_path)
    written, shown = of_jsonl(tmp_path), of_tensorboard(tmp_path)
    assert len(written) == 6
    # TensorBoard keeps float32.
    rounded = {
        name: {step: struct.unpack("f", struct.pack("f", v))[0] for step, v in values.items()}
        for name, values in written.items()
    }
    assert shown == rounded
    # What is not finite is in none of them.
    assert shown["actor/grad_norm"].keys() == {2}


def test_wandb_offline_holds_the_metrics_and_no_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("wandb", reason="pip install 'nested_reft_mcore[wandb]'")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    write(tmp_path, wandb_project="project")
    (path,) = (tmp_path / "wandb").glob("offline-run-*/run-*.wandb")
    found: Metrics = {}
    for record in of_wandb(path):
        items = {
            "/".join([item.key] if item.key else item.nested_key): float(item.value_json)
            for item in record.history.item
        }
        for name, value in items.items():
            if not name.startswith("_") and name != "step":
                found.setdefault(name, {})[int(items["step"])] = value
    assert found == of_jsonl(tmp_path)
    assert (tmp_path / "wandb_run_id").read_text().strip() in path.name
