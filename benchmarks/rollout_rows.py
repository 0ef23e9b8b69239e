"""The rows of bench_rollout.py: what is measured, against what, and how much is wanted."""

from __future__ import annotations

import functools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rollout_worker import REPOSITORY, Model, start_model

from nested_reft_mcore.algorithm.counter_random import Stream
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan, draw_plan, predicted_speedup
from nested_reft_mcore.bench.rounds import run_rounds

SMALL = "hidden=256,layers=12,heads=8,groups=2,ffn=704,vocab=8192"
"""10.6M parameters."""
SMOLLM2_SIZES = "hidden=576,layers=30,heads=9,groups=3,ffn=1536,vocab=49152"
"""SmolLM2-135M's, with random weights in Qwen2's layout: as fast, where it is not at hand."""


@dataclass(frozen=True)
class Settings:
    """What the script was started with."""

    hf: str | None
    """SmolLM2-135M as a Hugging Face directory; rows that are about it are skipped without."""
    vllm_python: str | None
    threads: int
    repeats: int

    @property
    def any_model(self) -> dict[str, str]:
        """SmolLM2 where it is there, else random weights of its sizes."""
        return {"hf": self.hf} if self.hf else {"shape": SMOLLM2_SIZES}


@dataclass(frozen=True)
class Line:
    """One figure of a row."""

    what: str
    against: str
    measured: float | None
    """None: not measured, `note` says why."""
    at_least: float | None = None
    """None: only reported."""
    aim: float | None = None
    at_most: float | None = None
    note: str = ""
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def verdict(self) -> str:
        """What became of it."""
        if self.measured is None:
            return "skipped"
        if self.at_most is not None:
            return "met" if self.measured <= self.at_most else "missed"
        if self.at_least is None and self.aim is None:
            return "reported"
        if self.aim is not None and self.measured >= self.aim:
            return "aim met"
        if self.at_least is None:
            return "below aim"
        return "met" if self.measured >= self.at_least else "missed"


Row = Callable[[Settings], list[Line]]


@functools.cache
def bench_rollout(threads: int, *arguments: str) -> dict[str, Any]:
    """The JSON of `nested-reft bench rollout`; rows that ask for the same share one run."""
    with tempfile.TemporaryDirectory() as name:
        output = Path(name) / "rollout.json"
        subprocess.run(
            [
                *(sys.executable, "-m", "nested_reft_mcore", "bench", "rollout", *arguments),
                *("--contexts", "none", "--parts", "layer", "--output", str(output)),
            ],
            env={
                **os.environ,
                "PYTHONPATH": str(REPOSITORY),
                "OMP_NUM_THREADS": str(threads),
                "OMP_WAIT_POLICY": "passive",
            },
            check=True,
        )
        return json.loads(output.read_text())


def small(settings: Settings) -> list[Line]:
    """Full depth on a small Qwen2 against transformers."""
    found = bench_rollout(
        settings.threads,
        *("--shape", SMALL, "--skip", "0", "--peers", "transformers"),
        *("--repeats", str(settings.repeats)),
    )
    return _against_peers(found, "10.6M model, 16 x 64 + 64", {"transformers": (2.0, 2.5)})


def smollm2_16(settings: Settings) -> list[Line]:
    """Full depth on SmolLM2, 16 sequences, against transformers and vLLM."""
    wanted = {"transformers": (1.8, None), "vllm": (1.5, None)}
    found = _smollm2(settings)
    if found is None:
        return [_no_model("SmolLM2, 16 x 64 + 64", "transformers, vLLM")]
    return _against_peers(found, "SmolLM2, 16 x 64 + 64", wanted)


def smollm2_64(settings: Settings) -> list[Line]:
    """Full depth on SmolLM2, 64 sequences, against transformers and vLLM."""
    if settings.hf is None:
        return [_no_model("SmolLM2, 64 x 64 + 64", "transformers, vLLM")]
    found = bench_rollout(
        settings.threads,
        *("--hf", settings.hf, "--prompts", "64", "--skip", "0", *_peer_options(settings)),
        *("--repeats", str(max(1, settings.repeats // 2))),
    )
    wanted = {"transformers": (2.0, 2.5), "vllm": (1.7, 2.0)}
    return _against_peers(found, "SmolLM2, 64 x 64 + 64", wanted)


def step(settings: Settings) -> list[Line]:
    """One decode step of SmolLM2 at 16 rows against what the machine can do."""
    what, against = "SmolLM2, a decode step of 16 rows", "reading weights, or arithmetic"
    found = _smollm2(settings)
    if found is None:
        return [_no_model(what, against)]
    decode_step = found["decode_step"]
    details = {**decode_step, "machine": found["machine"]}
    return [Line(what, against, decode_step["fraction"], aim=0.4, details=details)]


def skip(settings: Settings) -> list[Line]:
    """Skipping 3, 6, 9, 15 of 30 layers against the predicted ceiling."""
    found = _smollm2(settings)
    if found is None:
        return [_no_model("SmolLM2, skipping k of 30", "predicted ceiling")]
    rows = [row for row in found["workloads"][0]["rows"] if row["percentages"] not in ([], [0.0])]
    return [
        Line(
            f"SmolLM2, skipping {row['num_skipped']} of 30",
            f"predicted ceiling {row['ceiling']:.2f}",
            row["ratio"],
            at_least=0.95,
            note=f"speed-up {row['speedup']:.2f}",
            details=row,
        )
        for row in rows
    ]


def lengths(settings: Settings) -> list[Line]:
    """512 sequences of 4 to 64 tokens on 64 slots, against batches padded to their longest."""
    limits = [4 + place * 61 // 512 for place in range(512)]
    random.Random(0).shuffle(limits)
    with start_model({"shape": SMALL}, 1, settings.threads) as model:
        prompts = random_prompts(model, 512, 16)

        def run(batching: str) -> dict[str, Any]:
            return model.generate(prompts, 64, limits=limits, batching=batching)

        found = run_rounds(
            {name: functools.partial(run, name) for name in ("continuous", "static")},
            _rounds(settings),
        )
    ratio = _seconds(found["static"]) / _seconds(found["continuous"])
    speed = sum(limits) / _seconds(found["continuous"])
    return [
        Line(
            "10.6M model, 512 sequences of 4 to 64 tokens, 64 slots, prompts of 16",
            "batches padded to their longest",
            ratio,
            at_least=1.5,
            note=f"{speed:,.0f} tokens/s",
            details=found,
        )
    ]


def group(settings: Settings) -> list[Line]:
    """Groups of 8 samples of prompts with 256 tokens, against 8 prompts each."""
    with start_model(settings.any_model, 1, settings.threads) as model:
        prompts = random_prompts(model, 4, 256)
        separate = [ids for ids in prompts for _ in range(8)]
        cases = {
            "shared": lambda: model.generate(prompts, 32, num_samples=8),
            "separate": lambda: model.generate(separate, 32),
        }
        found = run_rounds(cases, _rounds(settings))
    work = found["separate"][0]["prefilled_tokens"] / found["shared"][0]["prefilled_tokens"]
    time = _seconds(found["separate"]) / _seconds(found["shared"])
    what = "4 groups of 8 samples, prompts of 256, 32 new"
    return [
        Line(what, "prefilled tokens of 32 prompts", work, at_least=8.0, details=found),
        Line(what, "time with 32 prompts", time),
    ]


def balance(settings: Settings) -> list[Line]:
    """PP 2: stage-balanced against uniform plans that are not, and what the fullest predicts."""
    with start_model(settings.any_model, 2, max(1, settings.threads // 2)) as model:
        prompts = random_prompts(model, 32, 32)
        extra = head_cost(model, prompts)
        plans = pipeline_plans(model, extra)
        cases = {
            text: functools.partial(model.generate, prompts, 48, text)
            for text in (plan.describe() for plan in plans)
        }
        found = run_rounds(cases, _rounds(settings))
        stages, texts = model.stage_of_layer, list(cases)
        predicted = [predicted_speedup(plan, stages, (0.0, extra)) for plan in plans]
    balanced = _seconds(found[texts[0]])
    lines = []
    for text, prediction in zip(texts[1:], predicted[1:], strict=True):
        gain = _seconds(found[text]) / balanced
        expected = predicted[0] / prediction
        lines.append(
            Line(
                f"PP 2, stage-balanced against uniform {text}",
                f"the fullest stage predicts {expected:.2f}",
                gain / expected,
                at_least=0.9,
                note=f"{gain:.2f}x as fast; the head costs as much as {extra:.1f} layers",
                details={"balanced": texts[0], "runs": found},
            )
        )
    return lines


def pipeline(settings: Settings) -> list[Line]:
    """PP 2 against PP 1 with the same cores, and how long each stage waits."""
    half = max(1, settings.threads // 2)
    with (
        start_model(settings.any_model, 1, 2 * half) as one,
        start_model(settings.any_model, 2, half) as two,
    ):
        prompts = random_prompts(two, 64, 32)
        extra = head_cost(two, prompts)
        cases = {}
        for name, plan in (("full depth", "none"), ("balanced", None)):
            text = pipeline_plans(two, extra)[0].describe() if plan is None else plan
            for model, size in ((one, 1), (two, 2)):
                cases[f"{name}, PP {size}"] = functools.partial(model.generate, prompts, 48, text)
        found = run_rounds(cases, _rounds(settings))
    lines = []
    for name in ("full depth", "balanced"):
        runs = found[f"{name}, PP 2"]
        gain = _seconds(found[f"{name}, PP 1"]) / _seconds(runs)
        waiting = [statistics.median(s) for s in zip(*(r["waiting_shares"] for r in runs))]  # noqa: B905
        note = " ".join(f"{share:.0%}" for share in waiting)
        note = f"by stage: {note}; the head costs as much as {extra:.1f} layers"
        lines += [
            Line(f"PP 2, {name}", "tokens/s of PP 1, same cores", gain, details=found),
            Line(
                f"PP 2, {name}", "largest share of waiting", max(waiting), at_most=0.15, note=note
            ),
        ]
    return lines


ROWS: dict[str, Row] = {
    "small": small,
    "smollm2-16": smollm2_16,
    "smollm2-64": smollm2_64,
    "step": step,
    "skip": skip,
    "lengths": lengths,
    "group": group,
    "balance": balance,
    "pipeline": pipeline,
}


def random_prompts(model: Model, number: int, length: int) -> list[list[int]]:
    """The same ones every time."""
    generator = random.Random(0)
    return [[generator.randrange(model.vocab_size) for _ in range(length)] for _ in range(number)]


def head_cost(model: Model, prompts: list[list[int]]) -> float:
    """What the last of two stages spends beside its layers, in units of a layer.

    With every layer skipped only the last stage works; at full depth it sets the pace.
    """
    everything = ",".join(map(str, range(model.num_layers)))
    cases = {
        text: functools.partial(model.generate, prompts, 48, text) for text in ("none", everything)
    }
    found = run_rounds(cases, 2)
    full, head = (min(run["seconds"] for run in found[text]) for text in ("none", everything))
    return head / max(1e-9, full - head) * model.num_layers / 2


def pipeline_plans(model: Model, extra: float) -> list[LayerSkipPlan]:
    """A stage-balanced plan that skips a third, then three uniform ones that are not balanced."""
    count = model.num_layers // 3
    stages, costs = model.stage_of_layer, (0.0, extra)

    def draw(law: Any, step: int) -> LayerSkipPlan:
        key = (Stream.PLAN, 0, step)
        return draw_plan(law, model.num_layers, count, 1, stages, key, "layer", costs)

    balanced = draw("stage_balanced", 0)
    best = predicted_speedup(balanced, stages, costs)
    uniform: dict[str, LayerSkipPlan] = {}
    for step in range(1000):
        plan = draw("uniform", step)
        if best / predicted_speedup(plan, stages, costs) >= 1.1:
            uniform[plan.describe()] = plan
        if len(uniform) == 3:
            break
    return [balanced, *uniform.values()]


def _smollm2(settings: Settings) -> dict[str, Any] | None:
    """The run that three rows share; None without SmolLM2."""
    if settings.hf is None:
        return None
    return bench_rollout(
        settings.threads,
        *("--hf", settings.hf, "--skip", "10,20,30,50", *_peer_options(settings)),
        *("--repeats", str(settings.repeats)),
    )


def _peer_options(settings: Settings) -> list[str]:
    if settings.vllm_python is None:
        return ["--peers", "transformers"]
    return ["--peers", "transformers,vllm", "--vllm-python", settings.vllm_python]


def _against_peers(
    found: dict[str, Any], what: str, wanted: dict[str, tuple[float, float | None]]
) -> list[Line]:
    """A line for every peer; one that was not measured says why."""
    workload = found["workloads"][0]
    ours = workload["rows"][0]["tokens_per_second"]
    peers = {peer["name"]: peer for peer in workload["peers"]}
    lines = []
    for name, (at_least, aim) in wanted.items():
        peer = peers.get(name)
        if peer is None or peer["reason"] is not None:
            note = peer["reason"] if peer else f"give --{name}-python"
            lines.append(Line(what, name, None, at_least, aim, note=f"not measured: {note}"))
            continue
        note = f"{ours:,.1f} against {peer['tokens_per_second']:,.1f} tokens/s"
        details = {"ours": workload["rows"][0], "theirs": peer}
        ratio = peer["ours_over_theirs"]
        lines.append(
            Line(what, f"{name} {peer['version']}", ratio, at_least, aim, None, note, details)
        )
    return lines


def _no_model(what: str, against: str) -> Line:
    return Line(what, against, None, note="not measured: give SmolLM2-135M by --hf")


def _rounds(settings: Settings) -> int:
    return max(1, -(-settings.repeats // 2))


def _seconds(runs: list[dict[str, Any]]) -> float:
    return statistics.median(run["seconds"] for run in runs)
