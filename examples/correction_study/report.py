"""Tables and figures of the study, from the collected results alone.

    python examples/correction_study/report.py --output docs/images

Prints a table in Markdown for each setup, and writes the same as `table_<setup>.csv` beside the
results, and the curves as `correction_study_<setup>.png` into the output directory.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paired import Interval, mean_and_deviation, paired_interval
from plan import REFERENCE
from results import RESULTS_DIRECTORY, read_rows

DESCRIPTION = "Tables and figures of the study, from the collected results alone."
Rows = dict[int, dict[str, Any]]
"""The runs of an arm, by seed."""
LAST_STEPS = 10
"""Steps at the end that a reward is the mean of."""
LEAST_PAIRS = 3
"""Pairs from which on an interval is shown; two give one that nobody should read."""
MANY_SEEDS = 7
"""Of an arm that a figure shows, where there are such arms."""
CURVES = {
    "reward": "reward of the rollouts, behavior policy",
    "kl": "KL(behavior || target), nats a token",
    "ess": "effective sample size",
    "num_skipped": "layers or parts skipped",
}
WINDOW = 7
"""Steps of a running mean, in the figures only."""


def main() -> None:
    """Print and write everything."""
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("--results", type=Path, default=RESULTS_DIRECTORY)
    parser.add_argument("--output", type=Path, default=Path("docs/images"))
    parser.add_argument("--versus", default=REFERENCE, help="arm that the others are compared with")
    parser.add_argument("--arm", action="append", help="in the figure; default: 7 seeds or more")
    arguments = parser.parse_args()
    for path in sorted(arguments.results.glob("*.jsonl")):
        arms = by_arm(read_rows(path))
        table = table_of(arms, arguments.versus)
        print(f"\n{path.stem}, against {arguments.versus}\n\n{markdown(table)}")
        if arguments.versus == REFERENCE:
            with path.with_name(f"table_{path.stem}.csv").open("w", encoding="utf-8") as file:
                writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
                writer.writeheader()
                writer.writerows(table)
            most = max(len(rows) for rows in arms.values())
            least = MANY_SEEDS if most >= MANY_SEEDS else min(LEAST_PAIRS, most)
            shown = arguments.arm or [name for name, rows in arms.items() if len(rows) >= least]
            draw({name: arms[name] for name in shown}, arguments.output, path.stem)


def by_arm(rows: Sequence[dict[str, Any]]) -> dict[str, Rows]:
    """The runs of each arm; the reference first, then those with most seeds."""
    arms: dict[str, Rows] = {}
    for row in rows:
        arms.setdefault(row["arm"], {})[row["seed"]] = row
    order = sorted(arms, key=lambda name: (name != REFERENCE, -len(arms[name]), name))
    return {name: arms[name] for name in order}


def table_of(arms: dict[str, Rows], versus: str) -> list[dict[str, Any]]:
    """One record an arm.

    ValueError if the arm to compare with has no runs, or if the runs of a pair were made on
    processors of two kinds: their warm starts differ.
    """
    if versus not in arms:
        raise ValueError(f"no runs of {versus!r}; there are {', '.join(arms)}")
    return [_record(name, rows, arms[versus]) for name, rows in arms.items()]


def _record(name: str, rows: Rows, reference: Rows) -> dict[str, Any]:
    record: dict[str, Any] = {"arm": name, "seeds": len(rows)}
    _check_machines(name, rows, reference)
    for measure in ("greedy", "sampled"):
        values, base = _final(rows, measure), _final(reference, measure)
        mean, deviation = mean_and_deviation(list(values.values()))
        record |= {measure: round(mean, 4), f"{measure}_deviation": round(deviation, 4)}
        if values.keys() & base.keys():
            interval = paired_interval(values, base)
            record |= {
                "pairs": interval.pairs,
                f"{measure}_difference": round(interval.mean, 4),
                f"{measure}_low": round(interval.low, 4),
                f"{measure}_high": round(interval.high, 4),
            }
    curves = {key: [row["curves"][key] for row in rows.values()] for key in CURVES}
    record["reward"] = round(_mean(_mean(curve[-LAST_STEPS:]) for curve in curves["reward"]), 4)
    for key in ("kl", "ess", "num_skipped"):
        record[key] = round(_mean(_mean(curve) for curve in curves[key]), 4)
    for key in ("tokens_per_second", "seconds_per_step", "cpu_seconds", "response_length"):
        record[key] = round(statistics.median(row[key] for row in rows.values()), 3)
    record["generation_share"] = round(
        statistics.median(
            row["seconds_generating"] / row["seconds_per_step"] for row in rows.values()
        ),
        3,
    )
    return record


def _check_machines(name: str, rows: Rows, reference: Rows) -> None:
    for seed in sorted(rows.keys() & reference.keys()):
        one, other = (runs[seed]["machine"]["model"] for runs in (rows, reference))
        if one != other:
            raise ValueError(
                f"seed {seed} of {name!r} was run on {one}, of the arm to compare with on {other}"
            )


def _final(rows: Rows, measure: str) -> dict[int, float]:
    return {seed: row["evaluations"][-1][measure] for seed, row in rows.items()}


def _mean(values: Any) -> float:
    return statistics.fmean(values)


def markdown(table: Sequence[dict[str, Any]]) -> str:
    """The table for people; differences with their 95% intervals, bold where 0 is not within."""
    head = ["arm", "seeds", "greedy", "difference", "sampled", "difference", "reward", "KL", "ESS"]
    head += ["skipped", "tokens/s", "s/step", "CPU s"]
    lines = [head, ["---"] * len(head)]
    for record in table:
        cells = [record["arm"], str(record["seeds"])]
        for measure in ("greedy", "sampled"):
            cells += [f"{record[measure]:.3f}", difference(record, measure)]
        cells += [f"{record['reward']:.3f}", f"{record['kl']:.3f}", f"{record['ess']:.3f}"]
        cells += [f"{record['num_skipped']:.2f}", f"{record['tokens_per_second']:,.0f}"]
        cells += [f"{record['seconds_per_step']:.2f}", f"{record['cpu_seconds']:.0f}"]
        lines.append(cells)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def difference(record: dict[str, Any], measure: str) -> str:
    """A difference and its interval; the mean alone where there are too few pairs for one."""
    if f"{measure}_low" not in record:
        return "no pair"
    mean = record[f"{measure}_difference"]
    low, high = record[f"{measure}_low"], record[f"{measure}_high"]
    if low == high == 0:
        return "0"
    if record["pairs"] < LEAST_PAIRS:
        return f"{mean:+.3f}"
    text = f"{mean:+.3f} ({low:+.3f}, {high:+.3f})"
    return f"**{text}**" if Interval(mean, low, high, record["pairs"]).excludes_zero else text


def draw(arms: dict[str, Rows], output: Path, name: str) -> None:
    """Running means over an arm's seeds of what was logged each step, and what accuracies lost."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 5, figsize=(20, 4.6), constrained_layout=True)
    labels = {arm: f"{arm}, {len(rows)} seeds" for arm, rows in arms.items()}
    for axis, (key, title) in zip(axes, CURVES.items(), strict=False):
        for arm, rows in arms.items():
            curves = [row["curves"][key] for row in rows.values()]
            means = [statistics.fmean(values) for values in zip(*curves, strict=False)]
            axis.plot(range(1, len(means) + 1), smooth(means), label=labels[arm], linewidth=1.4)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    _differences(axes[-1], arms)
    output.mkdir(parents=True, exist_ok=True)
    figure.savefig(output / f"correction_study_{name}.png", dpi=90)
    pyplot.close(figure)


def _differences(axis: Any, arms: dict[str, Rows]) -> None:
    """Of each arm: sampled accuracy less that of the first one, by seed; mean and 95% interval."""
    names = list(arms)
    base = _final(arms[names[0]], "sampled")
    for place, arm in enumerate(names):
        values = _final(arms[arm], "sampled")
        pairs = [values[seed] - base[seed] for seed in values.keys() & base.keys()]
        axis.plot([place] * len(pairs), pairs, ".", color="0.7", markersize=5)
        if len(pairs) >= LEAST_PAIRS:
            interval = paired_interval(values, base)
            spread = [[interval.mean - interval.low], [interval.high - interval.mean]]
            axis.errorbar(place, interval.mean, spread, fmt="_", markersize=14, capsize=4)
    axis.axhline(0, color="0.4", linewidth=0.8)
    axis.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize=8)
    axis.set_title(f"sampled accuracy at the end minus {names[0]}", fontsize=10)
    axis.grid(alpha=0.3)


def smooth(values: Sequence[float]) -> list[float]:
    """The mean of each value and up to `WINDOW` - 1 before it."""
    return [
        statistics.fmean(values[max(0, place - WINDOW + 1) : place + 1])
        for place in range(len(values))
    ]


if __name__ == "__main__":
    main()
