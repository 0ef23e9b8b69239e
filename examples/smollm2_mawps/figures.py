"""Print what a run's `metrics.jsonl` says: rewards, times and off-policyness, step by step."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

COLUMNS = (
    ("reward", "critic/rewards/mean", "8.3f"),
    ("grad norm", "actor/grad_norm", "10.3f"),
    ("kl", "rollout_corr/kl", "7.2f"),
    ("ess", "nested/ess", "6.2f"),
    ("tokens", "perf/generated_tokens", "8.0f"),
    ("tokens/s", "perf/generated_tokens_per_second", "10.0f"),
    ("gen s", "timing_s/gen", "8.1f"),
    ("update s", "timing_s/update_actor", "10.1f"),
    ("step s", "timing_s/step", "8.1f"),
)
"""Heading, metric, format. KL is in nats per token; ESS is a share of the tokens."""

ACCURACY = "val-core/eval/reward/"


def table(lines: list[dict[str, float]]) -> list[str]:
    """The steps as rows under a heading, then a line for each evaluation."""
    rows = ["step" + "".join(f"{name:>{width(form)}}" for name, _, form in COLUMNS)]
    for line in lines:
        if "timing_s/step" in line:
            cells = [f"{line[metric]:{form}}" for _, metric, form in COLUMNS]
            rows.append(f"{line['step']:4.0f}" + "".join(cells))
    for line in lines:
        found = {
            name[len(ACCURACY) :]: value
            for name, value in line.items()
            if name.startswith(ACCURACY) and not name.endswith(("/low", "/high"))
        }
        if found:
            share = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
            rows.append(
                f"evaluation after step {line['step']:.0f}, {line['val-aux/num_prompts']:.0f} "
                f"prompts: {share} ({line['timing_s/testing']:.1f} s)"
            )
    return rows


def width(form: str) -> int:
    """The columns that a format takes."""
    return int(form.split(".")[0])


def main() -> None:
    """Parse the command line and print the table."""
    parser = argparse.ArgumentParser(description="Print the figures of a run.")
    parser.add_argument("run", type=Path, help="run directory")
    metrics = parser.parse_args().run / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    print("\n".join(table(lines)))


if __name__ == "__main__":
    main()
