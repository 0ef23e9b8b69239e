"""The main job through the command line: warm-up, training, leaving, coming back, replay."""

from __future__ import annotations

import json
import signal
import subprocess
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from run_cases import (
    PIPELINE,
    finish,
    metrics_of,
    read_lines,
    run,
    start,
    wait_until,
    without_times,
    write_room,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.data.tokenizers import load_tokenizer

pytestmark = pytest.mark.distributed

NUM_STEPS = 8
WARM = "model={checkpoint: sft/checkpoints}"
# The run that is killed, resumed and replayed: in it everything moves that has a state.
# A KL between that of two layers and that of four, and no patience: the controller goes to and fro.
STEERED = (
    "controller={metric: kl, target: 0.006, patience: 1, max_wait: 2}",
    "diagnostics.split_every=2",
)
# Groups of eight with a mixed outcome are rare enough to ask for more prompts.
FILTERED = "algorithm={objective: ppo_clip, rollout_is: retrace, clip_ratio_low: 0.05, \
filter_groups: true, max_refills: 1, kl_loss_coef: 0.1}"
SFT = ("sft", "config.yaml", "data.train_path=task/sft.jsonl", PIPELINE, "checkpoint.interval=40")
# verl's names where the meaning is the same (perf/mfu belongs to what is not built yet).
METRICS = (
    *("critic/rewards/mean", "response_length/mean", "response_length/clip_ratio"),
    *("actor/entropy", "actor/pg_loss", "actor/ppo_kl", "actor/pg_clipfrac"),
    *("actor/grad_norm", "actor/lr"),
    *("rollout_corr/kl", "rollout_corr/k3_kl", "rollout_corr/chi2_token"),
    *("rollout_corr/rollout_is_mean", "rollout_corr/rollout_is_max"),
    *("rollout_corr/rollout_is_eff_sample_size", "perf/throughput", "perf/time_per_step"),
    *("timing_s/gen", "timing_s/reward", "timing_s/old_log_prob", "timing_s/update_actor"),
    *(
        "timing_s/ref",
        "timing_s/step",
        "nested/skip_ratio",
        "nested/num_skipped",
        "nested/stage_imbalance",
    ),
    *("nested/ratio_p05", "nested/ess"),
)
EVALUATION = tuple(
    f"{name}/{mode}"
    for name in ("val-core/eval/reward", "val-aux/eval/response_length", "val-aux/eval/clip_ratio")
    for mode in ("greedy", "mean@2")
)


def train(run_dir: str, *more: str) -> tuple[str, ...]:
    return ("train", "config.yaml", f"run_dir={run_dir}", WARM, *more)


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task, and in `sft` a warm start made by two processes."""
    directory = tmp_path_factory.mktemp("room")
    write_room(directory)
    run(directory, *SFT, "run_dir=sft")
    return directory


@pytest.fixture(scope="module")
def whole(room: Path) -> Path:
    """The run that nothing interrupts, on two pipeline stages."""
    run(room, *train("whole", PIPELINE, *STEERED, FILTERED, "checkpoint.export_hf=true"))
    return room / "whole"


def test_warm_up_learns_and_goes_on_from_a_path(room: Path) -> None:
    lines = metrics_of(room / "sft")
    losses = [line["sft/loss"] for line in lines if "sft/loss" in line]
    assert len(losses) == 4
    assert losses[-1] < 0.8 * losses[0]
    checkpoint = "checkpoint.resume=sft/checkpoints/step_00000040"
    run(room, *SFT, "run_dir=sft_again", checkpoint)
    again = without_times(metrics_of(room / "sft_again"))
    # What came before is in the checkpoint.
    assert [line["step"] for line in again] == [20, 40, 60, 80]
    assert again == without_times(lines)


def test_run_directory_tells_what_was_run(room: Path, whole: Path) -> None:
    assert load_config(whole / "config.yaml", []) == load_config(
        room / "config.yaml",
        [*train("whole", PIPELINE, *STEERED, FILTERED, "checkpoint.export_hf=true")[2:]],
    )
    environment = json.loads((whole / "environment.json").read_text())
    assert environment["world_size"] == 2
    assert environment["versions"]["torch"] == torch.__version__
    checkpoints = sorted(path.name for path in (whole / "checkpoints").iterdir())
    assert checkpoints == ["latest", "step_00000006", "step_00000008"]
    assert not (whole / "requeue").exists()


def test_inspect_tells_of_a_run(room: Path, whole: Path) -> None:
    out, _ = run(room, "inspect", "whole/checkpoints", "--checksums", "--json")
    found = json.loads(out)
    assert found["step"] == NUM_STEPS
    assert found["layout"] == {"tensor": 1, "pipeline": 2, "processes": 2}
    assert found["checksums"] == "read and right"
    assert any(tensor["name"].startswith("optimizer.") for tensor in found["tensors"])
    shown, _ = run(room, "inspect", "whole/checkpoints/step_00000006")
    assert "saved by" in shown
    assert "optimizer." not in shown.replace("tensors of the optimizer", "")


def test_metrics_have_the_names_of_the_vocabulary(whole: Path) -> None:
    lines = metrics_of(whole)
    by_step = {line["step"]: line for line in lines if "critic/rewards/mean" in line}
    assert list(by_step) == list(range(1, NUM_STEPS + 1))
    for line in by_step.values():
        assert set(METRICS) <= line.keys()
        assert line["nested/stage_imbalance"] == 1
    # Evaluation before the first step and every second one; a save is timed after its line.
    assert set(EVALUATION) <= lines[0].keys()
    assert lines[0]["step"] == 0
    evaluated = [step for step, line in by_step.items() if set(EVALUATION) <= line.keys()]
    assert evaluated == [2, 4, 6, 8]
    assert any("timing_s/testing" in line for line in lines)
    saved = [line for line in lines if "checkpoint/bytes" in line]
    assert len(saved) == 4
    for line in saved:
        assert "timing_s/save_checkpoint" in line
        assert 0 < line["checkpoint/stall_seconds"] < line["checkpoint/save_seconds"]
    assert all(line["actor/kl_loss"] > 0 for line in by_step.values())
    # The run is worth comparing with: something was learned from, and off-policy.
    assert sum(line["actor/grad_norm"] > 1e-3 for line in by_step.values()) > NUM_STEPS // 2
    assert any(line["actor/pg_clipfrac"] > 0 for line in by_step.values())
    for line in by_step.values():
        assert (line["rollout_corr/k3_kl"] > 1e-6) == (line["nested/num_skipped"] > 0)


def test_the_controller_moves_what_is_skipped(whole: Path) -> None:
    lines = _updates(whole)
    skipped = [line["nested/num_skipped"] for line in lines]
    assert skipped[0] == 2
    # Nothing in between makes two stages faster.
    assert set(skipped) == {0, 2, 4}
    assert sum(one != other for one, other in pairwise(skipped)) > 2
    for line, following in pairwise(lines):
        assert line["controller/off_policyness"] == max(0.0, line["rollout_corr/kl"])
        assert line["controller/next_num_skipped"] == following["nested/num_skipped"]


def test_the_ratio_is_split_every_second_step(whole: Path) -> None:
    split = {line["step"]: line for line in metrics_of(whole) if "nested/kl_skip" in line}
    assert list(split) == [1, 3, 5, 7]
    for line in split.values():
        # The ratio of decoupled PPO is old over behavior: staleness is beside it.
        parts = line["nested/kl_engine"] + line["nested/kl_skip"]
        assert parts == pytest.approx(line["rollout_corr/kl"], abs=1e-6)
        assert line["nested/kl_stale"] == pytest.approx(line["actor/ppo_kl"], abs=1e-6)
        assert abs(line["nested/kl_engine"]) < 1e-5
        assert 0 < line["timing_s/diagnostics"] < line["timing_s/step"]


def test_tensorboard_holds_the_same_numbers(whole: Path) -> None:
    events = EventAccumulator(str(whole / "tensorboard"))
    events.Reload()
    for name in ("critic/rewards/mean", "rollout_corr/kl"):
        shown = {event.step: event.value for event in events.Scalars(name)}
        written = {line["step"]: line[name] for line in metrics_of(whole) if name in line}
        assert shown == pytest.approx(written, rel=1e-6)


def test_rollouts_are_dumped_with_their_record(room: Path, whole: Path) -> None:
    tokenizer = load_tokenizer(room / "task" / "tokenizer.model")
    by_step = {line["step"]: line for line in metrics_of(whole) if "critic/rewards/mean" in line}
    plans = set()
    for step in range(NUM_STEPS):
        lines = read_lines(whole / "rollouts" / f"step_{step:06d}.dp0.jsonl")
        assert len(lines) == 32
        for line in lines:
            assert line["step"] == step
            assert tuple(tokenizer.encode(line["prompt"])) == tuple(line["prompt_token_ids"])
            assert tokenizer.decode(tuple(line["token_ids"])) == line["completion"]
            assert len(line["behavior_logprobs"]) == len(line["token_ids"])
            assert all(logprob < 0 for logprob in line["behavior_logprobs"])
            assert line["reward"] in (0.0, 1.0)
            assert line["plan"]["num_layers"] == 6
            assert line["source"].startswith("task/train.jsonl:")
        plans |= {line["plan"]["skipped"] for line in lines}
        assert {line["plan"]["skipped"] for line in lines} == {by_step[step + 1]["nested/plan"]}
        assert by_step[step + 1]["nested/num_layers"] == 6
        # Masked completions (groups that teach nothing) have no target; over the others the ratio
        # is what the metrics say: skipping, and staleness of the second update.
        parts = [
            behavior - target
            for line in lines
            if "target_logprobs" in line
            for behavior, target in zip(
                line["behavior_logprobs"], line["target_logprobs"], strict=True
            )
        ]
        metrics = by_step[step + 1]
        assert sum(parts) / len(parts) == pytest.approx(
            metrics["rollout_corr/kl"] + metrics["actor/ppo_kl"], abs=1e-4
        )
        taught = [line for line in lines if "target_logprobs" in line]
        assert all(line["advantage"] == 0 for line in lines if line not in taught)
        assert any(line["advantage"] != 0 for line in taught)
        # Metrics count finished steps, files the running one.
        mean = sum(line["reward"] for line in lines) / 32
        assert by_step[step + 1]["critic/rewards/mean"] == pytest.approx(mean)
    vocabulary = json.loads((whole / "rollouts" / "vocabulary.json").read_text())
    assert len(vocabulary) == tokenizer.vocab_size
    assert vocabulary[tokenizer.encode("gets")[-1]] == "gets"
    assert plans <= {"none", "1,3", "1,4", "2,3", "2,4", "1,2,3,4"}
    assert len(plans) > 2


def test_killed_and_resumed_equals_uninterrupted(room: Path, whole: Path) -> None:
    """SIGTERM, then SIGKILL after a checkpoint; what is left to do is told by the last start."""
    directory = room / "killed"
    # More steps than are ever reached: the kill can't come too late.
    endless = start(room, *train("killed", PIPELINE, *STEERED, FILTERED, "train.num_steps=1000"))
    wait_until(endless, lambda: _last_step(directory) >= 1)
    endless.send_signal(signal.SIGTERM)
    code, _, err = finish(endless)
    assert code == 75, err
    stopped_at = _checkpoint_step(directory)
    assert (directory / "requeue").read_text() == f"step {stopped_at}\n"
    assert _last_step(directory) == stopped_at < NUM_STEPS

    endless = start(room, *train("killed", PIPELINE, *STEERED, FILTERED, "train.num_steps=1000"))
    wait_until(
        endless,
        lambda: stopped_at < _checkpoint_step(directory) < _last_step(directory),
    )
    endless.kill()
    assert finish(endless)[0] == -signal.SIGKILL
    assert not (directory / "requeue").exists()
    assert stopped_at < _checkpoint_step(directory) < NUM_STEPS

    run(room, *train("killed", PIPELINE, *STEERED, FILTERED))
    expected, found = without_times(metrics_of(whole)), without_times(metrics_of(directory))
    assert len(found) == len(expected)
    for line, other in zip(found, expected, strict=True):
        assert line == other
    for folder in ("rollouts", "evaluation"):
        for path in (whole / folder).iterdir():
            assert (directory / folder / path.name).read_bytes() == path.read_bytes()


def _last_step(directory: Path) -> int:
    return max((line["step"] for line in metrics_of(directory)), default=-1)


def _checkpoint_step(directory: Path) -> int:
    latest = directory / "checkpoints" / "latest"
    return int(latest.read_text().strip().removeprefix("step_")) if latest.exists() else -1


def test_replay_repeats_updates_without_generating(room: Path, whole: Path) -> None:
    arguments = ("rollout.replay=whole", "data.train_path=null", "train.num_steps=3", FILTERED)
    run(room, *train("replayed", PIPELINE, *arguments))
    original = {line["step"]: line for line in metrics_of(whole) if "actor/pg_loss" in line}
    lines = [line for line in metrics_of(room / "replayed") if "actor/pg_loss" in line]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert "perf/generated_tokens_per_second" not in line
        learned = [name for name in line if name.startswith(("actor/", "rollout_corr/", "critic/"))]
        assert len(learned) > 15
        for name in (*learned, "nested/ess", "nested/ratio_p05"):
            assert line[name] == original[line["step"]][name], name


def test_speculative_rollouts_are_on_policy(room: Path) -> None:
    """Drafted with layers skipped, and still the full policy's own, whose log-probs they carry."""
    arguments = (PIPELINE, "train.num_steps=2", "rollout.mode=speculative")
    _, log = run(room, *train("lossless", *arguments))
    for line in _updates(room / "lossless"):
        assert 0 < line["nested/accept_rate"] <= 1
        assert line["nested/draft_skip_ratio"] > 0
        assert line["nested/num_skipped"] == 0
        assert line["nested/layer_passes/stage_0"] > 0
        # No coefficient asks for a reference policy, so there is none.
        assert "timing_s/ref" not in line
    first = _updates(room / "lossless")[0]
    assert abs(first["rollout_corr/kl"]) < 1e-5
    assert first["nested/ess"] == pytest.approx(1.0, abs=1e-4)
    assert "rollout_corr/k3_kl" not in log


def test_replicas_change_nothing(room: Path) -> None:
    """One process, and two replicas with everything distributed and overlapped."""
    algorithm = "algorithm={objective: ppo_clip, bypass_mode: true, clip_ratio_low: 0.05, \
filter_groups: true, max_refills: 1}"
    # Groups of four: in one step too few of two generations teach.
    filtered = (algorithm, "rollout.group_size=4")
    steps = ("train.num_steps=3", "diagnostics.split_every=1", *filtered)
    run(room, *train("single", *steps))
    distributed = "optimizer.use_distributed_optimizer=true"
    overlaps = ("optimizer.overlap_grad_reduce=true", "optimizer.overlap_param_gather=true")
    run(room, *train("replicas", *steps, "parallel.data_parallel_size=2", distributed, *overlaps))
    single, replicas = _updates(room / "single"), _updates(room / "replicas")
    assert [line["step"] for line in replicas] == [1, 2, 3]
    for line, other in zip(replicas, single, strict=True):
        assert line.keys() == other.keys()
        for key in other:
            # Passes are counted on one replica, and each pads to its own longest row.
            if key == "nested/plan":
                assert line[key] == other[key]
            elif not key.startswith(("nested/layer_passes", "perf/padding_share")):
                # Products of a sequence's ratios, less 1, keep the rounding of something near 1.
                assert line[key] == pytest.approx(other[key], rel=1e-5, abs=5e-7), key
    assert {line["rollout/num_refills"] for line in single} == {1}
    assert any(line["rollout/num_filled_groups"] > 0 for line in single)
    for step, line in enumerate(single):
        rewards = [reward for _, _, _, reward, *_ in _rollouts(room / "single", step)]
        equal = [len(set(rewards[i : i + 4])) == 1 for i in range(0, 16, 4)]
        assert sum(equal) == line["rollout/num_filled_groups"]
        # Tokens that were generated, not only those that are learnt from.
        lengths = [len(tokens) for _, _, tokens, *_ in _rollouts(room / "single", step)]
        assert line["perf/generated_tokens"] > sum(lengths)
    for line in single:
        # Two updates a step: the second one's policy is not the one that generated.
        assert abs(line["nested/kl_stale"]) > 1e-4
        parts = [line[f"nested/kl_{name}"] for name in ("engine", "skip", "stale")]
        assert sum(parts) == pytest.approx(line["rollout_corr/kl"], abs=1e-6)
    for step in range(3):
        assert _rollouts(room / "replicas", step) == _rollouts(room / "single", step)
    assert len(list((room / "replicas" / "rollouts").glob("step_000000.*"))) == 2


def _updates(run_dir: Path) -> list[dict[str, Any]]:
    lines = without_times(metrics_of(run_dir))
    return [line for line in lines if "actor/pg_loss" in line]


def _rollouts(run_dir: Path, step: int) -> list[Any]:
    """What the replicas dumped, in the order of the global batch."""
    paths = sorted((run_dir / "rollouts").glob(f"step_{step:06d}.dp*.jsonl"))
    keys = ("prompt_index", "sample_index", "token_ids", "reward", "finish_reason", "plan")
    return [[line[key] for key in keys] for path in paths for line in read_lines(path)]


def test_evaluate_prints_what_the_run_measured(room: Path, whole: Path) -> None:
    trained = ("--checkpoint", "whole/checkpoints", "run_dir=measured", "--output", "figures.json")
    out, _ = run(room, "evaluate", "config.yaml", *trained)
    last = [line for line in metrics_of(whole) if EVALUATION[0] in line][-1]
    measured = json.loads((room / "figures.json").read_text())["metrics"]
    for name in EVALUATION:
        assert measured[name] == pytest.approx(last[name])
    low, high = (last[f"val-core/eval/reward/mean@2/{end}"] for end in ("low", "high"))
    shown = f"{100 * last['val-core/eval/reward/mean@2']:.1f} [{100 * low:.1f}, {100 * high:.1f}]"
    assert shown in out
    completions = (room / "figures.completions.jsonl").read_text()
    assert completions == (whole / "evaluation" / "step_000008.jsonl").read_text()


def test_export_loads_in_transformers_and_answers_alike(room: Path, whole: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole / "hf").eval()
    tokenizer = load_tokenizer(whole / "hf")
    greedy = [
        line
        for line in read_lines(whole / "evaluation" / "step_000008.jsonl")
        if line["mode"] == "greedy"
    ]
    assert len(greedy) == 8
    for line in greedy:
        prompt = torch.tensor([tokenizer.encode(line["prompt"])])
        found = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=8,
            pad_token_id=tokenizer.pad_token_id,
        )
        assert tokenizer.decode(tuple(found[0, prompt.shape[1] :].tolist())) == line["completion"]


def test_users_mistakes_that_only_the_run_can_find(room: Path) -> None:
    (room / "empty.jsonl").write_text("\n")
    line = '{"prompt": "tom 5 ?", "answer": "5", "demonstration": "# 5"}\n'
    (room / "torn.jsonl").write_text(line + line[:12] + "\n")
    cases = (
        (train("refused", PIPELINE, "data.train_path=empty.jsonl"), "empty.jsonl: the data set is"),
        (train("refused", "data.train_path=torn.jsonl"), "torn.jsonl:2: not JSON: found"),
        (train("sft"), "model.checkpoint: sft/checkpoints is among the checkpoints of run_dir=sft"),
        (
            ("train", "config.yaml", "run_dir=sft", PIPELINE),
            "sft/checkpoints/step_00000080: was saved by `sft`, this is `train`",
        ),
        (train("refused", "checkpoint.resume=gone"), "gone: does not exist"),
    )
    processes = [start(room, *arguments) for arguments, _ in cases]
    for (arguments, text), process in zip(cases, processes, strict=True):
        _check_refusal(process, arguments, text)


def _check_refusal(process: subprocess.Popen[str], arguments: Any, text: str) -> None:
    code, _, err = finish(process)
    assert code == 2, (arguments, err)
    assert err.count("error:") == 1, err
    assert f"error: {text}" in err
    assert "Traceback" not in err
