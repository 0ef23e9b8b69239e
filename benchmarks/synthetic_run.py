"""A run directory of any size, as `nested-reft train` would have written it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import yaml

NUM_LAYERS = 28
TEXT = """so the first number is then we add both sides and get three apples left over because
each box holds twelve of them which gives us half price for two tickets per day total cost"""
WORDS = TEXT.split()


def write_run(
    directory: Path, num_steps: int, rollout_bytes: int, seed: int = 0, num_skipped: int = 4
) -> None:
    """Metrics of `num_steps` steps and about `rollout_bytes` of rollouts in groups of eight."""
    draw = random.Random(seed)
    (directory / "rollouts").mkdir(parents=True)
    vocabulary = ["", *(f" {word}" for word in WORDS), *(str(i) for i in range(10)), "\n"]
    (directory / "rollouts" / "vocabulary.json").write_text(json.dumps(vocabulary))
    config = {
        "run_dir": str(directory.name),
        "seed": seed,
        "nested": {"num_skipped": num_skipped, "law": "uniform", "part": "layer"},
        "rollout": {"prompts_per_step": 8, "group_size": 8},
        "algorithm": {"objective": "ppo_clip", "rollout_is": "tis", "advantage": "grpo"},
        "train": {"num_steps": num_steps},
    }
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    (directory / "environment.json").write_text(
        json.dumps({"hostname": "synthetic", "world_size": 1, "versions": {}, "git": None})
    )
    budget = rollout_bytes / num_steps
    with (directory / "metrics.jsonl").open("w") as metrics:
        for step in range(num_steps):
            skipped = sorted(draw.sample(range(1, NUM_LAYERS - 1), num_skipped))
            plan = ",".join(map(str, skipped)) or "none"
            path = directory / "rollouts" / f"step_{step:06d}.dp0.jsonl"
            rewards = _write_rollouts(path, step, num_steps, plan, vocabulary, budget, draw)
            line = _metrics(step, num_steps, rewards, draw) | {
                "nested/plan": plan,
                "nested/num_layers": NUM_LAYERS,
                "nested/num_skipped": num_skipped,
            }
            metrics.write(json.dumps(line) + "\n")


def _write_rollouts(
    path: Path,
    step: int,
    num_steps: int,
    plan: str,
    vocabulary: list[str],
    budget: float,
    draw: random.Random,
) -> list[float]:
    rewards: list[float] = []
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < budget or len(rewards) % 8:
            prompt, sample = divmod(len(rewards), 8)
            tokens = [draw.randrange(1, len(vocabulary)) for _ in range(draw.randint(60, 400))]
            behavior = [round(-draw.expovariate(1.5), 7) for _ in tokens]
            rewards.append(float(draw.random() < 0.2 + 0.6 * step / num_steps))
            line: dict[str, Any] = {
                "step": step,
                "prompt_index": prompt,
                "sample_index": sample,
                "prompt": f"Question {step}.{prompt}: how many are left?",
                "completion": "".join(vocabulary[token] for token in tokens),
                "answer": str(prompt),
                "reward": rewards[-1],
                "finish_reason": "length" if draw.random() < 0.05 else "stop",
                "plan": {"num_layers": NUM_LAYERS, "skipped": plan},
                "source": f"train.jsonl:{step * 8 + prompt}",
                "prompt_token_ids": [1, 2, 3],
                "token_ids": tokens,
                "behavior_logprobs": behavior,
                "advantage": round(draw.gauss(0, 1), 6),
                "target_logprobs": [round(b + draw.gauss(0, 0.15), 4) for b in behavior],
            }
            if draw.random() < 0.002:
                line["judge_failure"] = "timeout"
            file.write(json.dumps(line) + "\n")
    return rewards


def _metrics(
    step: int, num_steps: int, rewards: list[float], draw: random.Random
) -> dict[str, float]:
    seconds = {name: draw.uniform(1, 2) for name in ("gen", "reward", "old_log_prob")}
    seconds["update_actor"] = draw.uniform(2, 3)
    kl = 0.02 * math.exp(draw.gauss(0, 0.3))
    line = {
        "step": step + 1,
        "time": 1.79e9 + 9.0 * step,
        "critic/rewards/mean": sum(rewards) / len(rewards),
        "response_length/mean": draw.uniform(200, 260),
        "response_length/clip_ratio": 0.05,
        "perf/generated_tokens_per_second": draw.uniform(900, 1100),
        "perf/generated_tokens": 1e5,
        "perf/time_per_step": sum(seconds.values()) + 0.2,
        "rollout_corr/kl": kl,
        "nested/ess": math.exp(-2 * kl),
        "nested/ratio_p05": math.exp(-4 * kl),
        "training/skipped_updates": float(step // 400),
        "reward/timeouts": float(step // 90),
        "reward/errors": 0.0,
        "timing_s/step": sum(seconds.values()) + 0.2,
        **{f"timing_s/{name}": value for name, value in seconds.items()},
        # As many as a real run has.
        **{f"actor/figure_{i}": draw.gauss(0, 1) for i in range(60)},
    }
    if step % 50 == 49:
        line |= {"val-core/eval/reward/greedy": 0.3 + 0.4 * step / num_steps}
        line |= {"val-aux/num_prompts": 256.0}
    return line
