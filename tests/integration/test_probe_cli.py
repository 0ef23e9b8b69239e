"""`probe` through the command line, and a run that draws its plans from what it wrote."""

import json
from pathlib import Path
from typing import Any

import pytest
from inference_cases import PROMPT_LINES, write_lines, write_model_with_tokenizer
from typer.testing import CliRunner

from nested_reft_mcore.algorithm.counter_random import Stream
from nested_reft_mcore.cli import app
from nested_reft_mcore.config.probe_record import read_probe
from nested_reft_mcore.mcore.initialize import shutdown
from nested_reft_mcore.rollout.dump import load_rollouts
from nested_reft_mcore.training.sensitivity_law import sensitivity_law

BUDGET = 0.3
NUM_STEPS = 3
CONFIG: dict[str, Any] = {
    "run_dir": "run",
    "seed": 3,
    "data": {"train_path": "train.jsonl"},
    "nested": {
        "law": "sensitivity",
        "sensitivity_path": "probe.json",
        "kl_budget": BUDGET,
        "border_layers": 0,
    },
    "rollout": {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 4},
    "train": {"num_steps": NUM_STEPS, "micro_batch_size": 4},
    "evaluation": {"interval": 0},
    "checkpoint": {"interval": 0},
    "logging": {"dump_rollouts": True, "tensorboard": False},
}

pytestmark = pytest.mark.usefixtures("keep_logging")


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with `model`, prompts, a configuration, and `probe.json` from a real probe."""
    directory = tmp_path_factory.mktemp("probe")
    write_model_with_tokenizer(directory / "model")
    write_lines(directory / "prompts.jsonl", PROMPT_LINES)
    write_lines(directory / "train.jsonl", [{"prompt": f"w{n} w4", "answer": n} for n in range(4)])
    (directory / "config.yaml").write_text(json.dumps(CONFIG), encoding="utf-8")
    return directory


@pytest.fixture(autouse=True)
def at_home(room: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Relative paths start in the room."""
    monkeypatch.chdir(room)


def call(*arguments: str) -> Any:
    done = CliRunner().invoke(app, list(arguments))
    # A command that failed leaves its groups to the end of its process.
    shutdown()
    return done


@pytest.fixture(scope="module")
def printed(room: Path) -> str:
    """What a probe with a comparison prints; it wrote `probe.json` and `probe.png`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(room)
        model = ("--hf", "model", "--prompts", "prompts.jsonl", "--output", "probe.json")
        sizes = ("--max-new-tokens", "8", "--context-length", "24", "--decode-sequences", "2")
        numbers = ("--repeats", "3", "--random-layers", "1,2", "--draws", "2", "--num-samples", "2")
        budgets = ("--kl-budget", str(BUDGET), "--compare", f"0.2,{BUDGET}")
        done = call("probe", *model, *sizes, *numbers, *budgets)
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_probe_tells_and_writes_what_it_measured(room: Path, printed: str):
    record = read_probe(room / "probe.json")
    assert [(p.layer, p.part) for p in record.parts] == [
        (layer, part) for part in ("layer", "attention", "mlp") for layer in range(4)
    ]
    assert all(p.kl > 0 and p.kl_error > 0 and 0 < p.overlap < 1 for p in record.parts)
    times = record.times
    assert times.attention + times.mlp == pytest.approx(times.layer)
    assert 4 * times.layer + times.head == pytest.approx(times.step, rel=1e-6)
    assert min(times.attention, times.mlp) >= 0.05 * times.layer
    assert f"noise {times.noise:.0%} of what all layers take" in printed
    assert ("WARNING: these times are mostly noise" in printed) == (times.noise > 0.2)
    assert record.answers.num_sequences == 12
    assert {plan.kind for plan in record.plans} >= {"random", "calibration"}
    # Plans of the law stay within the budget as predicted, and near it as measured.
    held_out = [plan for plan in record.plans if plan.kind == "held_out"]
    seen = {plan.skipped for plan in record.plans if plan.kind == "calibration"}
    assert not seen & {plan.skipped for plan in held_out}
    assert all(plan.predicted_kl <= BUDGET * (1 + 1e-9) for plan in held_out)
    assert all(0.3 < plan.kl / plan.predicted_kl < 3.0 for plan in held_out)
    for plan in record.plans:
        own = sum(
            part.kl
            for part in record.parts
            if f"{part.layer}.{part.part}".removesuffix(".layer") in plan.skipped.split(",")
        )
        assert plan.total_kl == pytest.approx(own)
    assert {row.law for row in record.comparison} >= {"sensitivity", "uniform layer"}
    for budget in (0.2, BUDGET):
        rows = {row.law: row for row in record.comparison if row.kl_budget == budget}
        assert rows["uniform layer"].speedup <= rows["sensitivity"].speedup + 1e-9 or (
            rows["uniform layer"].num_skipped == 1
        )
    for part in record.parts:
        assert f"{part.kl:8.4f} +-{part.kl_error:7.4f}" in printed
    assert "nested.law=sensitivity nested.kl_budget=0.3" in printed
    assert ("held-out plans: measured / predicted" in printed) == bool(held_out)
    assert (room / "probe.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_skips_what_the_law_draws(room: Path, printed: str):
    done = call("train", "config.yaml", "--hf", "model")
    assert done.exit_code == 0, done.output
    law = sensitivity_law(read_probe(room / "probe.json"), BUDGET, (0,) * 4)
    expected = [law.draw((Stream.PLAN, 3, step)) for step in range(NUM_STEPS)]
    assert all(0 < law.predicted_kl(plan) <= BUDGET for plan in expected)
    for step, plan in enumerate(expected):
        rollouts, _ = load_rollouts(room / "run", step, range(2))
        assert rollouts.plan == plan


def with_change(room: Path, name: str, *keys: str, value: Any) -> str:
    """The probe with one value replaced, as a file of its own."""
    data = json.loads((room / "probe.json").read_text())
    here = data
    for key in keys[:-1]:
        here = here[key]
    if value is None:
        del here[keys[-1]]
    else:
        here[keys[-1]] = value
    (room / name).write_text(json.dumps(data))
    return f"nested.sensitivity_path={name}"


def test_what_a_run_refuses(room: Path, printed: str):
    (room / "broken.json").write_text("{")
    (room / "other.json").write_text("[1]")
    shape = ("model", "architecture")
    cases = [
        (["nested.sensitivity_path=absent.json"], "nested.sensitivity_path: absent.json does not"),
        (["nested.sensitivity_path=broken.json"], "broken.json: cannot be read as JSON"),
        (["nested.sensitivity_path=other.json"], "other.json: is no probe"),
        (
            [with_change(room, "old.json", "version", value=0)],
            "old.json: `version` is 0, expected 1; probe the model again",
        ),
        (
            [with_change(room, "deep.json", *shape, "num_layers", value=6)],
            "deep.json: `model.architecture.num_layers` is 6, but the model has 4",
        ),
        (
            [with_change(room, "less.json", "times", "layer", value=None)],
            "`times.layer` is missing",
        ),
        (
            [with_change(room, "far.json", "interaction", "largest_kl", value=0.01)],
            "nested.kl_budget=0.3: far.json measured plans of at most 0.01 nats per token",
        ),
        (["nested.kl_budget=null"], "nested.law=sensitivity needs nested.kl_budget"),
        (["nested.sensitivity_path=null"], "nested.law=sensitivity needs nested.sensitivity_path"),
        (["nested.num_skipped=2"], "nested.law=sensitivity with nested.num_skipped=2"),
        (["nested.part=mlp"], "nested.law=sensitivity with nested.part=mlp: this law chooses"),
        (["nested.law=sensitive"], "`nested.law`: expected 'uniform', 'stage_balanced' or 'sens"),
        (["nested.law=uniform"], "nested.sensitivity_path is set, but only nested.law=sensitivity"),
        (["nested.protected_layers=[4]"], "nested.protected_layers: layer 4 does not exist"),
        (["nested.kl_budget=0.0001"], "the cheapest, "),
        (["controller.metric=kl", "controller.target=0.1"], "steers a number of layers"),
    ]
    for overrides, message in cases:
        done = call("train", "config.yaml", "--hf", "model", "run_dir=refused", *overrides)
        assert done.exit_code == 2, (overrides, done.output)
        assert message in done.stderr
        assert done.stderr.count("error: ") == 1
        assert "Traceback" not in done.stderr


def test_what_a_probe_refuses(room: Path):
    good = ("--prompts", "prompts.jsonl", "--output", "out.json")
    hf = ("--hf", "model")
    cases = [
        ((*good,), "expected exactly one of --hf DIR and --checkpoint DIR, got neither"),
        ((*hf, "--prompts", "absent.jsonl", "--output", "o.json"), "absent.jsonl: does not exist"),
        ((*hf, *good, "--context-length", "65"), "--context-length 65: expected at most"),
        ((*hf, *good, "--random-layers", "1,5"), "--random-layers 1,5: the model has 4 layers"),
        ((*hf, *good, "--compare", "0.1,x"), "--compare 0.1,x: cannot use 'x'; expected positive"),
        ((*hf, *good, "--kl-budget", "0"), "`kl_budget`: expected greater than 0"),
        ((*hf, *good, "--max-new-tokens", "64"), "--max-new-tokens 64: the model has 64 positions"),
        ((*hf, "--prompts", "prompts.jsonl", "--output", "model"), "model: is a directory"),
    ]
    for arguments, message in cases:
        done = call("probe", *arguments)
        assert done.exit_code == 2, (arguments, done.output)
        assert message in done.stderr
        assert done.stderr.count("error: ") == 1
        assert "Traceback" not in done.stderr
    assert not (room / "out.json").exists()


def test_help_teaches():
    done = call("probe", "--help")
    assert done.exit_code == 0
    for word in ("KL(nested || full)", "--kl-budget", "nested.sensitivity_path=probe.json"):
        assert word in done.stdout
