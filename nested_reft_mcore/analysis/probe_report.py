"""A probe as tables."""

from __future__ import annotations

import statistics

from nested_reft_mcore.config.probe_record import Advice, ProbedPart, ProbeRecord


def print_probe(record: ProbeRecord) -> None:
    """Print what was measured and what follows from it."""
    lines = [*_heading(record), "", *_part_lines(record), "", *_plan_lines(record)]
    lines += ["", *_advice_lines(record)]
    if record.comparison:
        lines += ["", *_comparison_lines(record)]
    print("\n" + "\n".join(lines), flush=True)


def _heading(record: ProbeRecord) -> list[str]:
    answers, times = record.answers, record.times
    per_step = 100 / times.step
    lines = [
        f"{record.model.source}: {record.model.architecture.num_layers} layers, "
        f"{answers.num_sequences} answers, {answers.num_tokens} tokens, temperature "
        f"{answers.temperature:g}",
        f"decode pass of {times.num_sequences} sequences at {times.context_length} positions: "
        f"{times.step * 1e3:.2f} ms; one layer {times.layer * per_step:.1f}% of it (attention "
        f"{times.attention * per_step:.1f}%, MLP {times.mlp * per_step:.1f}%), the head "
        f"{times.head * per_step:.1f}%; noise {times.noise:.0%} of what all layers take",
    ]
    if times.is_noise:
        lines.append(
            "WARNING: these times are mostly noise, and so are the speed-ups below and what the "
            "law `sensitivity` skips: measure again on an idle machine, or with more --repeats"
        )
    return lines


def _part_lines(record: ProbeRecord) -> list[str]:
    by_place = {(part.layer, part.part): part for part in record.parts}
    lines = [
        "KL(nested || full) in nats per token of skipping one part alone, with its standard error,",
        "and the mean of sum min(p, q)",
        f"{'layer':>5}  {'whole layer':^24}  {'attention':^24}  {'MLP':^24}",
    ]
    for layer in range(record.model.architecture.num_layers):
        cells = [
            _cell(by_place[layer, name]) if (layer, name) in by_place else " " * 24
            for name in ("layer", "attention", "mlp")
        ]
        lines.append(f"{layer:>5}  " + "  ".join(cells))
    return lines


def _cell(part: ProbedPart) -> str:
    return f"{part.kl:8.4f} +-{part.kl_error:7.4f} {part.overlap:5.2f}"


def _plan_lines(record: ProbeRecord) -> list[str]:
    fit = record.interaction
    lines = [
        f"together: KL = {fit.scale:.3g} * (sum of KLs) ^ {fit.exponent:.3g}, fitted to the law's "
        f"own plans up to {fit.largest_kl:.3g} nats",
        f"{'':12} {'parts':>5} {'sum':>8} {'predicted':>9} {'measured':>8} {'+-':>7} speed-up",
    ]
    for plan in record.plans:
        name = f"{plan.part} (k)" if plan.kind == "random" else plan.kind.replace("_", " ")
        lines.append(
            f"{name:12} {plan.num_skipped:5} {plan.total_kl:8.4f} {plan.predicted_kl:9.4f} "
            f"{plan.kl:8.4f} {plan.kl_error:7.4f} {plan.speedup:7.3f}x  {plan.skipped}"
        )
    ratios = record.held_out_ratios
    if ratios:
        typical = statistics.geometric_mean(ratios)
        lines.append(
            f"held-out plans: measured / predicted {typical:.2f} in the geometric mean, "
            f"{min(ratios):.2f} to {max(ratios):.2f}"
        )
    return lines


def _advice_lines(record: ProbeRecord) -> list[str]:
    law = record.law
    lines = [f"for a budget of {law.kl_budget:g} nats per token:"]
    lines += [_advice(advice) for advice in record.advice]
    if law.num_plans:
        lines.append(
            f"  nested.law=sensitivity nested.kl_budget={law.kl_budget:g}: {law.num_plans:,} "
            f"plans, {law.speedup:.3f}x, KL {law.predicted_kl:.3g}"
        )
        if law.never_skipped:
            lines.append(
                f"  every part is dearer than the budget in layers {_list(law.never_skipped)}"
            )
    else:
        lines.append("  nested.law=sensitivity: the budget buys nothing")
    return lines


def _advice(advice: Advice) -> str:
    if advice.num_skipped == 0:
        return f"  nested.part={advice.part}: no random one is within it"
    protected = f" nested.protected_layers=[{_list(advice.protected_layers)}]"
    return (
        f"  nested.part={advice.part} nested.border_layers={advice.border_layers}"
        f"{protected if advice.protected_layers else ''} nested.num_skipped={advice.num_skipped}: "
        f"{advice.speedup:.3f}x, KL {advice.predicted_kl:.3g}"
    )


def _comparison_lines(record: ProbeRecord) -> list[str]:
    lines = [
        f"{'budget':>6}  {'law':26} {'skipped':>7} {'speed-up':>8} {'KL':>8} {'+-':>7} overlap"
    ]
    for row in record.comparison:
        lines.append(
            f"{row.kl_budget:6g}  {row.law:26} {row.num_skipped:7.1f} {row.speedup:7.3f}x "
            f"{row.kl:8.4f} {row.kl_error:7.4f} {row.overlap:7.3f}"
        )
    return lines


def _list(layers: tuple[int, ...]) -> str:
    return ",".join(map(str, layers))
