"""An evaluation gives the same figures and completions at any layout, killed or not."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from inference_cases import read_lines, write_lines
from inference_cases import write_model_with_tokenizer as write_model
from megatron.core import parallel_state
from run_workers import run_workers

from nested_reft_mcore.config.load import config_from_dict
from nested_reft_mcore.config.schema import ParallelConfig
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.training import evaluation_run
from nested_reft_mcore.training.evaluation_record import PartWriter, RawCompletion

LAYOUTS = {
    "dp2": {"data_parallel_size": 2},
    "tp2": {"tensor_model_parallel_size": 2},
    "pp2": {"pipeline_model_parallel_size": 2},
}
KILLED_AFTER = 25
"""Completions: within the samples of the full policy."""


class Killed(Exception):
    pass


class MortalWriter(PartWriter):
    """Leaves a torn line behind and takes the process with it."""

    num_added = 0

    def add(self, completion: RawCompletion) -> None:
        if MortalWriter.num_added == KILLED_AFTER:
            assert self._file is not None
            self._file.write('{"policy": "full", "mod')
            self._file.flush()
            raise Killed
        MortalWriter.num_added += 1
        super().add(completion)


def evaluate(ranks: RankInfo, room: Path, jobs: Sequence[tuple[str, dict[str, Any], bool]]) -> None:
    """Each job: name, parallel sizes, and whether it is killed on the way."""
    for name, sizes, is_killed in jobs:
        values = json.loads((room / "config.json").read_text()) | {"parallel": sizes}
        config = config_from_dict(values)
        context = initialize_parallel(ParallelConfig(**sizes), ranks, seed=0)
        if is_killed:
            evaluation_run.Parts.open = lambda self, replica: MortalWriter(  # type: ignore
                self.directory / "start_000_replica_0000.jsonl"
            )
            with pytest.raises(Killed):
                evaluation_run.run_evaluation(config, context, room / f"{name}.json")
        else:
            evaluation_run.run_evaluation(config, context, room / f"{name}.json")
        parallel_state.destroy_model_parallel()
    shutdown()


def write_room(room: Path, answers: Sequence[str]) -> None:
    """Two sets, one with levels; two policies, four samples, more prompts than slots."""
    for name, rows in (("first", range(0, 7)), ("second", range(7, 12))):
        write_lines(
            room / f"{name}.jsonl",
            [
                {"prompt": f"w{3 * i + 1} w{i}", "answer": answers[i], "kind": {"level": i % 2}}
                for i in rows
            ],
        )
    config = {
        "run_dir": str(room / "run"),
        "seed": 5,
        "model": {"hf_path": str(room / "model")},
        "data": {
            "eval": [
                {"path": str(room / "first.jsonl"), "fields": {"level": "kind.level"}},
                {"path": str(room / "second.jsonl"), "name": "other"},
            ]
        },
        "rollout": {"max_new_tokens": 6, "max_slots": 5},
        "evaluation": {"num_samples": 4, "skip_layers": ["1", "0.attention,2.mlp"]},
    }
    (room / "config.json").write_text(json.dumps(config))


@pytest.mark.distributed
def test_any_layout_and_a_killed_start_give_the_same(tmp_path: Path, capfd):
    write_model(tmp_path / "model")
    write_room(tmp_path, ["1"] * 12)
    run_workers(evaluate, 1, tmp_path, [("guesses", {}, False)])
    # What sometimes comes out is right, so that rewards differ.
    lines = read_lines(tmp_path / "guesses.completions.jsonl")
    sampled = [line for line in lines if line["mode"] == "sampled" and line["policy"] == "full"]
    answers = [line["completion"].split()[-1][1:] or "1" for line in sampled if line["sample"] == 1]
    write_room(tmp_path, [a if a.isdecimal() else "1" for a in answers])

    run_workers(evaluate, 1, tmp_path, [("whole", {}, False), ("killed", {}, True)])
    left = list((tmp_path / "killed.parts").glob("*.jsonl"))
    assert len(left) == 1
    assert len(left[0].read_bytes().splitlines()) == KILLED_AFTER + 1
    layouts = [(name, sizes, False) for name, sizes in LAYOUTS.items()]
    run_workers(evaluate, 2, tmp_path, [("killed", LAYOUTS["dp2"], False), *layouts])

    whole = json.loads((tmp_path / "whole.json").read_text())
    completions = read_lines(tmp_path / "whole.completions.jsonl")
    assert len(completions) == 12 * 3 * (1 + 4)
    assert 0.1 < whole["metrics"]["val-core/first/reward/mean@4"] < 0.9
    order = [(line["policy"], line["mode"], line["dataset"], line["row"]) for line in completions]
    assert order[:2] == [("full", "greedy", "first", 0), ("full", "greedy", "first", 1)]
    for name in ("killed", *LAYOUTS):
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["figures"] == whole["figures"], name
        assert found["settings"] == whole["settings"]
        assert found["metrics"] == whole["metrics"]
        assert read_lines(tmp_path / f"{name}.completions.jsonl") == completions
        assert not (tmp_path / f"{name}.parts").exists()
    # What was there was not made again.
    speed = json.loads((tmp_path / "killed.json").read_text())["speed"]
    by_task = {(one["policy"], one["mode"]): one["generated_tokens"] for one in speed}
    assert by_task["full", "greedy"] == 0
    assert 0 < by_task["full", "sampled"] < sum(line["num_tokens"] for line in sampled)
    check_figures(whole, completions)


def check_figures(whole: dict[str, Any], completions: list[dict[str, Any]]) -> None:
    """The file of completions is where the figures come from."""
    metrics = whole["metrics"]
    for policy, suffix in (("full", ""), ("1", "@skip=1")):
        greedy = [
            line["reward"]
            for line in completions
            if (line["policy"], line["mode"], line["dataset"]) == (policy, "greedy", "other")
        ]
        assert len(greedy) == 5
        assert metrics[f"val-core/other{suffix}/reward/greedy"] == sum(greedy) / 5
    level = [
        line["reward"]
        for line in completions
        if line["labels"] == {"level": "1"}
        and (line["policy"], line["mode"]) == ("full", "sampled")
    ]
    assert len(level) == 3 * 4
    assert metrics["val-aux/first/level=1/reward/mean@4"] == pytest.approx(sum(level) / 12)
    # Skipped layers make another policy.
    texts = {
        policy: [line["completion"] for line in completions if line["policy"] == policy]
        for policy in ("full", "1", "0.attention,2.mlp")
    }
    assert texts["full"] != texts["1"] != texts["0.attention,2.mlp"]
