"""A calibration and its check as text, and as plain values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from nested_reft_mcore.planning.calibration import Calibration
from nested_reft_mcore.planning.calibration_check import Check
from nested_reft_mcore.planning.calibration_points import Row
from nested_reft_mcore.planning.calibration_ranking import Ranking, Verdict
from nested_reft_mcore.planning.measured_run import PARTS

_KINDS = ("layout", "law")
_VERDICTS: dict[Verdict, str] = {
    "right": "right",
    "wrong": "wrong",
    "missed": "one apart, the other not",
    "indistinguishable": "cannot be told apart",
}


def calibration_table(made: Calibration) -> str:
    """What was fitted: before, after, how sure, and which times tell it."""
    rows = [("number", "before", "fitted", "within a factor", "told by")]
    for value in made.values:
        factor = f"{value.factor:.2f}"
        rows.append((value.name, f"{value.before:.4g}", f"{value.after:.4g}", factor, value.source))
    return f"fitted to {len(made.run_names)} runs\n\n" + _table(rows)


def remarks_of(made: Calibration) -> dict[str, str]:
    """A remark for each line of the profile that was fitted."""
    return {
        value.name: f"fitted, within a factor {value.factor:.2f}: {value.source}"
        if value.is_told
        else value.source
        for value in made.values
    }


def check_tables(title: str, check: Check) -> str:
    """Points that were held out, predicted and measured; then pairs."""
    worst = check.worst
    lines = [
        f"{title}: {len(check.rows)} points that were held out, seconds predicted / measured",
        "",
        _table([_HEAD, *(_cells(row) for row in check.rows)]),
        "",
        f"step time: median error {check.median_error:.1%}, largest in percent {worst.error:+.1%} "
        f"({worst.point.name}); tokens/s: median error {check.median_tokens_error:.1%}",
    ]
    for part in PARTS:
        errors = sorted(
            abs(row.predicted[part] / row.point.seconds[part] - 1)
            for row in check.rows
            if row.point.seconds[part] > 0
        )
        if errors:
            lines.append(f"{part}: median error {errors[len(errors) // 2]:.1%}")
    return "\n".join([*lines, "", *_ranking_lines(check)])


def check_record(check: Check) -> dict[str, Any]:
    """Everything, for programs; numbers to four digits."""
    return _rounded(
        {
            "median_error": check.median_error,
            "median_tokens_error": check.median_tokens_error,
            "largest_error": check.worst.error,
            "largest_error_of": check.worst.point.name,
            "drift": check.drift,
            "points": [
                {
                    "name": row.point.name,
                    "measured": {"step": row.point.step_seconds, **row.point.seconds},
                    "predicted": {"step": row.predicted_step, **row.predicted},
                    "tokens": row.point.tokens,
                    "noise": row.point.noise,
                    "error": row.error,
                }
                for row in check.rows
            ],
            "pairs": [asdict(ranking) for ranking in check.rankings],
            "alike": check.alike,
        }
    )


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(inner) for inner in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


_HEAD = ("point", "step", "error", "generation", "update", "tokens/s", "noise")


def _cells(row: Row) -> tuple[str, ...]:
    point = row.point
    return (
        point.name,
        _pair(row.predicted_step, point.step_seconds),
        f"{row.error:+.1%}",
        _pair(row.predicted["generation"], point.seconds["generation"]),
        _pair(row.predicted["update"], point.seconds["update"]),
        f"{point.tokens / row.predicted_step:,.0f} / {point.tokens / point.step_seconds:,.0f}",
        f"{point.noise:.1%}",
    )


def _ranking_lines(check: Check) -> list[str]:
    rows = [("pairs that differ in the", *_VERDICTS.values())]
    for what in _KINDS:
        if any(ranking.what == what for ranking in check.rankings):
            rows.append((what, *(str(check.count(what, verdict)) for verdict in _VERDICTS)))
    lines = [_table(rows)] if len(rows) > 1 else ["no pairs that differ in layout or law alone"]
    return [*lines, *_noise_lines(check), *_pair_lines(check)]


def _noise_lines(check: Check) -> list[str]:
    """What counts as a difference."""
    if not check.rankings:
        return []
    if check.drift is None:
        return [
            "apart: by more than two deviations of scatter of the steps alone; no two runs of a "
            "seed do the same updates, so nothing tells the drift between runs"
        ]
    return [
        "apart: by more than two deviations of the measured ratio, of scatter of the steps and of "
        f"drift between runs ({check.drift:.1%} a run, by updates that do the same)"
    ]


def _pair_lines(check: Check) -> list[str]:
    """Pairs that are misses, pairs that cannot differ, and all laws together."""
    lines = [
        f"{name}: {_ratio_text(ranking)}"
        for verdict, name in _VERDICTS.items()
        for ranking in check.rankings
        if ranking.verdict == verdict and verdict in ("wrong", "missed")
    ]
    lines += [
        f"not counted: {other} and {one}: all plans leave the stages the same numbers of layers"
        for one, other in check.alike
    ]
    laws = check.laws_together()
    if laws is not None:
        lines.append(
            f"laws, all pairs together: uniform steps are {laws.measured:.3f} times as long "
            f"({2 * laws.noise:.1%} either way), predicted {laws.predicted:.3f}; their updates, "
            f"which skip nothing, are {laws.updates:.3f} times as long"
        )
    return lines


def _ratio_text(ranking: Ranking) -> str:
    return (
        f"{ranking.other} takes {ranking.measured:.3f} times as long as {ranking.one} "
        f"({2 * ranking.noise:.1%} either way); predicted {ranking.predicted:.3f}"
    )


def _pair(predicted: float, measured: float) -> str:
    return f"{predicted:.3g} / {measured:.3g}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose columns are aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(map(str.ljust, row, widths)) + " |" for row in rows]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
