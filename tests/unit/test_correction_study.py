"""examples/correction_study: paired intervals, and which runs are done, repeated or named."""

import json
import math
import random
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import nested_reft_mcore
from nested_reft_mcore.config.checks import check_for_evaluation, check_for_training
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import load_config

EXAMPLE = Path(nested_reft_mcore.__file__).parents[1] / "examples" / "correction_study"
sys.path.insert(0, str(EXAMPLE))

from paired import paired_interval, t_quantile  # noqa: E402
from plan import OUTCOME_FILE, WARM_UP, load_study, state_of  # noqa: E402
from report import by_arm, markdown, table_of  # noqa: E402
from runner import OUTPUT_FILE, PROBE_FILE, Runner, commands_of  # noqa: E402


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),
    # Standard tables of Student's t.
    [
        (0.975, 1, 12.70620474),
        (0.975, 2, 4.30265273),
        (0.975, 7, 2.36462425),
        (0.95, 5, 2.01504837),
        (0.995, 30, 2.74999565),
        (0.5, 4, 0.0),
    ],
)
def test_quantiles_are_those_of_the_tables(probability, degrees, expected):
    assert t_quantile(probability, degrees) == pytest.approx(expected, abs=1e-7)


def test_interval_of_three_pairs_by_hand():
    # Differences 1, 2, 3: mean 2, deviation 1, half width 4.30265 / sqrt(3).
    arm, reference = {0: 11.0, 1: 22.0, 2: 3.0, 7: 99.0}, {2: 0.0, 1: 20.0, 0: 10.0, 9: -99.0}
    interval = paired_interval(arm, reference)
    assert (interval.mean, interval.pairs) == (2.0, 3)
    assert interval.high - 2 == pytest.approx(2.48413771)
    assert 2 - interval.low == pytest.approx(2.48413771)
    assert not interval.excludes_zero
    assert paired_interval(arm, reference, level=0.8).excludes_zero


def test_interval_covers_the_truth_as_often_as_it_says():
    rng = random.Random(0)
    hits = 0
    for _ in range(2000):
        reference = {seed: rng.gauss(0, 10) for seed in range(8)}
        arm = {seed: value + rng.gauss(0.3, 1) for seed, value in reference.items()}
        interval = paired_interval(arm, reference)
        hits += interval.low <= 0.3 <= interval.high
    # Five standard errors of a share of 2,000.
    assert abs(hits / 2000 - 0.95) < 5 * math.sqrt(0.95 * 0.05 / 2000)


def test_too_few_pairs_establish_nothing():
    single = paired_interval({3: 1.0}, {3: 0.0})
    assert (single.mean, single.low, single.high) == (1.0, -math.inf, math.inf)
    assert not single.excludes_zero
    with pytest.raises(ValueError, match="no seed"):
        paired_interval({1: 1.0}, {2: 1.0})
    with pytest.raises(ValueError, match="level"):
        paired_interval({1: 1.0}, {1: 1.0}, level=1.0)


def test_study_file_holds_runs_that_train_accepts(tmp_path):
    study = load_study(EXAMPLE / "study.yaml")
    names = [run.name for run in study.runs]
    assert len(names) == len(set(names))
    places = {name: place for place, name in enumerate(names)}
    assert all(run.start is None or places[run.start] < places[run.name] for run in study.runs)
    main = next(grid for grid in study.grids if grid.name == "main")
    assert len(main.seeds) == 8
    of_main = [run for run in study.runs[: 8 * (1 + len(main.arms))] if run.start]
    assert [run.seed for run in of_main] == sorted(run.seed for run in of_main)
    assert [run.arm for run in of_main[: len(main.arms)]] == list(main.arms)
    checks = {"train": check_for_training, "evaluate": check_for_evaluation}
    checked = set()
    for run in {(run.setup.name, run.arm): run for run in study.runs if run.start}.values():
        for words in commands_of(run, tmp_path):
            command = words[3]
            if command in checks:
                overrides = [word for word in words if "=" in word and not word.startswith("-")]
                checks[command](load_config(run.setup.config, overrides))
                checked.add((command, run.options["nested.law"]))
    assert checked >= {("evaluate", "uniform"), ("evaluate", "sensitivity")}


def test_runs_by_sensitivity_probe_their_own_warm_start_first(tmp_path):
    runs = load_study(EXAMPLE / "study.yaml").runs
    run = next(run for run in runs if run.options.get("nested.law") == "sensitivity")
    probe, train = commands_of(run, tmp_path)
    start = tmp_path / str(run.start) / "checkpoints"
    file = tmp_path / run.name / PROBE_FILE
    assert "probe" in probe
    assert all(words[words.index("--checkpoint") + 1] == str(start) for words in (probe, train))
    assert probe[probe.index("--output") + 1] == str(file)
    assert f'nested.sensitivity_path="{file}"' in train


GRID = {"name": "g", "setup": "s", "seeds": 1, "arms": ["one"]}


@pytest.mark.parametrize(
    ("grids", "message"),
    [
        ([GRID | {"arms": ["nothing"]}], "grid g: no arm 'nothing'"),
        ([GRID | {"setup": "t"}], "grid g: no setup 't'"),
        ([GRID, GRID], "two grids are called 'g'"),
        ([GRID | {"seeds": "8"}], r"study.yaml:\d+: `grids.0.seeds"),
        ([GRID | {"seeds": -1}], r"study.yaml:\d+: `grids.0.seeds"),
        ([GRID | {"seeds": [0, -1]}], r"study.yaml:\d+: `grids.0.seeds"),
        ([GRID | {"arm": ["one"]}], r"^\S+study.yaml:\d+: unknown key `grids.0.arm`; did .*`\?$"),
        ([], "grids: there is none"),
    ],
)
def test_study_file_with_a_mistake_is_refused(tmp_path, grids, message):
    with pytest.raises(UserError, match=message):
        load_study(write_study(tmp_path, grids))


def test_mistakes_end_with_a_line_and_code_2(tmp_path):
    script = EXAMPLE / "study.py"
    file = write_study(tmp_path, [GRID])
    (tmp_path / "config.yaml").unlink()
    for options, message in (
        (("--grid", "x"), "study.yaml: no grid 'x'; expected one of main, "),
        (("--study", str(file)), "config.yaml does not exist"),
        (("--study", str(tmp_path / "other.yaml")), "other.yaml"),
    ):
        words = [sys.executable, str(script), "status", "--root", str(tmp_path / "runs"), *options]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert message in done.stderr
        assert done.stderr.count("\n") == 1


def test_long_stories_copy_every_change_before_its_value(tmp_path):
    options = ["--num-operations", "10", "--copy", "--direct-share", "0", "--num-eval", "0"]
    sizes = ["--num-train", "0", "--num-demonstrations", "50"]
    script = EXAMPLE.parent / "cpu_demo" / "make_task.py"
    subprocess.run(
        [sys.executable, str(script), "--output", str(tmp_path), *options, *sizes], check=True
    )
    for line in (tmp_path / "sft.jsonl").read_text().splitlines():
        story = json.loads(line)
        _, value, *changes, _ = story["prompt"].split()
        first, *steps = story["demonstration"].removeprefix("> ").split(" , ")
        number = int(value)
        for (verb, size), step in zip(
            zip(changes[::2], changes[1::2], strict=True), [first, *steps], strict=True
        ):
            number += int(size) if verb in ("finds", "gets") else -int(size)
            assert step == f"{verb} {size} {number}"
        assert len(steps) == 9
        assert number == story["answer"]


def write_study(directory, grids, **options):
    file = directory / "study.yaml"
    (directory / "config.yaml").touch()
    file.write_text(
        yaml.safe_dump(
            {
                "config": "config.yaml",
                "common": {},
                "training": options,
                "setups": {"s": {"title": "a task", "task": []}},
                "arms": {"on_policy": {"a": 0}, "one": {"a": 1}, "two": {"a": 2}},
                "grids": grids,
            }
        )
    )
    return file


@pytest.fixture
def study_file(tmp_path):
    grids = [
        {"name": "g", "setup": "s", "seeds": 2, "arms": ["on_policy", "one"]},
        {"name": "h", "setup": "s", "seeds": [0], "arms": ["one", "two"]},
    ]
    return write_study(tmp_path, grids)


class Sitting:
    """Runs a study of processes that only note their name, and fail where a file says so."""

    def __init__(self, root):
        self.root, self.said = root, []
        root.mkdir(exist_ok=True)

    def __call__(self, file, *, retry=False, deadline=None, jobs=1):
        noted = self.root / "noted"
        noted.write_text("")
        runner = Runner(self.root, jobs, self.said.append, deadline, self.commands)
        runner.run(load_study(file).runs, retry)
        return noted.read_text().split(), runner.broken

    def commands(self, run, root):
        note = f"open({str(root / 'noted')!r}, 'a').write({run.name + ' '!r})"
        fail = f"import os, sys; sys.exit(os.path.exists({str(self.fault(run.name))!r}))"
        return [[sys.executable, "-S", "-c", text] for text in (note, fail)]

    def fault(self, name):
        return self.root / ("fail_" + name.replace("/", "_"))


WARM = [f"s/{WARM_UP}/seed0", f"s/{WARM_UP}/seed1"]


def test_finished_runs_are_never_repeated_and_broken_ones_are_named(study_file, tmp_path):
    sit = Sitting(tmp_path / "runs")
    sit.fault("s/one/seed0").touch()
    sit.fault(WARM[1]).touch()
    ran, broken = sit(study_file)
    # Seed by seed, each run once though two grids hold it; nothing starts from a broken warm-up.
    assert ran == [WARM[0], "s/on_policy/seed0", "s/one/seed0", WARM[1], "s/two/seed0"]
    assert broken == ["s/one/seed0", WARM[1], "s/on_policy/seed1", "s/one/seed1"]
    assert any(f"s/one/seed0/{OUTPUT_FILE}" in line for line in sit.said)
    states = {run.name: state_of(run, sit.root) for run in load_study(study_file).runs}
    assert states["s/two/seed0"] == "finished"
    assert states["s/one/seed0"] == states[WARM[1]] == "broken"
    assert states["s/on_policy/seed1"] == "missing"

    assert sit(study_file) == ([], broken)
    for fault in sit.root.glob("fail_*"):
        fault.unlink()
    ran, broken = sit(study_file, retry=True, jobs=2)
    assert sorted(ran) == sorted(["s/one/seed0", WARM[1], "s/on_policy/seed1", "s/one/seed1"])
    assert ran.index(WARM[1]) < ran.index("s/on_policy/seed1")
    assert broken == []


def test_interrupted_and_changed_runs_are_run_again(study_file, tmp_path):
    sit = Sitting(tmp_path / "runs")
    assert sit(study_file, deadline=1.0) == ([], [])
    sit(study_file)
    (sit.root / "s/one/seed1" / OUTCOME_FILE).unlink()
    (sit.root / "s/on_policy/seed1" / OUTCOME_FILE).write_text('{"exit_code": 0, "opt')
    (sit.root / "s/two/seed0" / OUTCOME_FILE).write_text("{}")
    runs = {run.name: run for run in load_study(study_file).runs}
    assert state_of(runs["s/one/seed1"], sit.root) == "interrupted"
    assert sit(study_file)[0] == ["s/on_policy/seed1", "s/one/seed1", "s/two/seed0"]
    changed = yaml.safe_load(study_file.read_text())
    changed["arms"]["two"]["a"] = 3
    study_file.write_text(yaml.safe_dump(changed))
    two = next(run for run in load_study(study_file).runs if run.arm == "two")
    assert state_of(two, sit.root) == "stale"
    assert sit(study_file)[0] == ["s/two/seed0"]


def test_table_states_differences_of_pairs():
    rows = [
        row(arm, seed, 0.5 + seed / 10 - lost + seed * lost / 10)
        for arm, lost in (("one", 0.1), ("on_policy", 0.0))
        for seed in range(4)
    ]
    table = table_of(by_arm(rows), "on_policy")
    assert [record["arm"] for record in table] == ["on_policy", "one"]
    assert table[1]["sampled_difference"] == pytest.approx(-0.085)
    # Deviation of 0, .01, .02, .03 is .0129; 3.182 * .0129 / 2 = .0205.
    assert table[1]["sampled_low"] == pytest.approx(-0.1055, abs=1e-4)
    assert "**-0.085 (-0.105, -0.065)**" in markdown(table)
    with pytest.raises(ValueError, match="no runs of 'two'"):
        table_of(by_arm(rows), "two")
    rows[2]["machine"] = {"model": "another"}
    with pytest.raises(ValueError, match="seed 2 of 'one' was run on another"):
        table_of(by_arm(rows), "on_policy")


def row(arm, seed, accuracy):
    numbers = dict.fromkeys(
        ("tokens_per_second", "seconds_per_step", "seconds_generating", "cpu_seconds"), 1.0
    )
    curves = {key: [0.5, 0.5] for key in ("reward", "kl", "ess", "num_skipped")}
    evaluations = [{"greedy": accuracy, "sampled": accuracy}]
    return {
        "arm": arm,
        "seed": seed,
        "evaluations": evaluations,
        "curves": curves,
        "response_length": 3.0,
        "machine": {"model": "a processor"},
        **numbers,
    }
