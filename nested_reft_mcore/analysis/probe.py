"""What skipping each part of a policy costs and saves: the work behind `nested-reft probe`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from nested_reft_mcore.algorithm.kl_interaction import (
    InteractionFit,
    KlInteraction,
    Recommendation,
    fit_interaction,
    recommend,
)
from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan, Part, draw_plan
from nested_reft_mcore.algorithm.sensitivity import SensitivityLaw
from nested_reft_mcore.analysis.decode_times import measure_decode_times
from nested_reft_mcore.analysis.plan_meter import PlanMeter
from nested_reft_mcore.analysis.probe_calibration import plans_near_budget, plans_of_a_fair_fit
from nested_reft_mcore.analysis.probe_compare import compare_laws
from nested_reft_mcore.analysis.probe_plot import plot_probe
from nested_reft_mcore.analysis.probe_report import print_probe
from nested_reft_mcore.analysis.skip_times import SkipTimes
from nested_reft_mcore.checkpoints.publish import write_whole
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.probe import ProbeOptions
from nested_reft_mcore.config.probe_record import (
    Advice,
    ComparedLaw,
    Divergence,
    FittedInteraction,
    LawAdvice,
    ProbedAnswers,
    ProbedModel,
    ProbedPart,
    ProbedPlan,
    ProbeRecord,
)
from nested_reft_mcore.data.jsonl_writer import check_output_file
from nested_reft_mcore.data.stream import shard_range
from nested_reft_mcore.hf.config import model_architecture
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.agreement import on_main
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.observability.environment import environment_report
from nested_reft_mcore.observability.progress import Progress
from nested_reft_mcore.rollout.completion import Detokenize
from nested_reft_mcore.rollout.engine import RolloutEngine
from nested_reft_mcore.rollout.types import Prompt, Rollout, SamplingParams
from nested_reft_mcore.training.inference import read_prompts
from nested_reft_mcore.training.policy_setup import load_policy, load_policy_tokenizer
from nested_reft_mcore.training.replicas import gather_from_replicas
from nested_reft_mcore.training.sampling import stop_token_ids
from nested_reft_mcore.training.sensitivity_law import law_of_parts

PARTS: tuple[Part, ...] = ("layer", "attention", "mlp")
_LEVELS = (0.3, 0.6, 1.0)
"""Shares of the budget that the sums of KLs of calibration plans fill."""
_RANDOM, _CALIBRATION, _HELD_OUT, _ADVICE = range(4)
_ADVICE_DRAWS = 32


def probe_policy(options: ProbeOptions, context: ParallelContext) -> None:
    """Probe as `options` says; every process calls it. Rank 0 prints, and writes JSON and PNG.

    Raises:
        UserError: a file, a line of the prompts or an option is wrong.
    """
    plot = options.plot or str(Path(options.output).with_suffix(".png"))
    for path in (options.output, plot):
        check_output_file(path)
    model = options.model()
    architecture = model_architecture(model)
    tokenizer = load_policy_tokenizer(model, options.tokenizer_path, architecture)
    prompts = read_prompts(options, tokenizer, architecture)[: options.limit]
    if len(prompts) < context.data.size:
        raise UserError(
            f"--prompts {options.prompts}: {len(prompts)} prompts for {context.data.size} replicas "
            "of the model; expected at least one for each"
        )
    sampling = SamplingParams(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        stop_token_ids=stop_token_ids(tokenizer, options.stop_tokens),
        stop_strings=options.stop_strings,
        seed=options.seed,
    )
    policy = load_policy(model, options.parallel, context)
    detokenize = tokenizer.decode if options.stop_strings else None
    answers = _sample_answers(policy, prompts, options.num_samples, sampling, detokenize)
    counts = gather_from_replicas((len(answers), sum(len(a.token_ids) for a in answers)), context)
    num_sequences, num_tokens = (sum(column) for column in zip(*counts, strict=True))
    if min(count for count, _ in counts) == 0:
        raise UserError(f"--prompts {options.prompts}: the model's answers have no tokens")
    probe = Probe(policy, options, answers)
    record = probe.run(
        ProbedAnswers(
            prompts=options.prompts,
            num_prompts=len(prompts),
            num_sequences=num_sequences,
            num_tokens=num_tokens,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
    )

    # What takes longest is safe before laws are compared.
    on_main(lambda: write_probe(record, options.output), context)
    record = record.model_copy(update={"comparison": probe.compare(record)})

    def finish() -> None:
        print_probe(record)
        write_probe(record, options.output)
        plot_probe(record, plot)
        print(f"{options.output}, {plot}", flush=True)

    on_main(finish, context)


def write_probe(record: ProbeRecord, path: str) -> None:
    """Write the record as JSON, aside first."""
    # A link stays a link: what it points to is replaced.
    target = Path(path).resolve()
    target.parent.mkdir(parents=True, exist_ok=True)
    write_whole(
        target, json.dumps(record.model_dump(mode="json"), indent=1, allow_nan=False) + "\n"
    )


class Probe:
    """Measures single parts, random layers and plans of the law, in this order."""

    def __init__(self, policy: Policy, options: ProbeOptions, answers: Sequence[Rollout]) -> None:
        self._policy = policy
        self._options = options
        self._num_layers = policy.architecture.num_layers
        self._meter = PlanMeter(
            policy,
            answers,
            batch_size=options.batch_size,
            temperature=options.temperature,
            pad_to_multiple=(
                policy.context.tensor.size if options.parallel.sequence_parallel else 1
            ),
        )

    def run(self, answers: ProbedAnswers) -> ProbeRecord:
        """Everything but the comparison, as the record to write."""
        options, policy = self._options, self._policy
        times = measure_decode_times(
            policy,
            context_length=options.timed_context(policy.architecture),
            num_sequences=options.decode_sequences,
            repeats=options.repeats,
        )
        self._times = SkipTimes.of(times, policy.stage_of_layer)
        parts = self._single_parts()
        self._law_of = partial(law_of_parts, parts, times, stage_of_layer=policy.stage_of_layer)
        self._own_kl = {(p.layer, p.part): p.kl for p in parts}
        advices, plans = self._random_layers(parts)
        calibration = plans_near_budget(
            options.kl_budget,
            self._calibration_plans,
            lambda plans: [found.kl for found in self._measure(plans, "calibration")],
        )
        calibration = plans_of_a_fair_fit(calibration, partial(self._test_fit, random=tuple(plans)))
        fit, largest = self._fit(calibration, plans)
        law = self._law(options.kl_budget, fit.interaction)
        held_out = self._held_out(law, calibration)
        for kind, drawn in (("calibration", calibration), ("held_out", held_out)):
            found = self._measure(drawn, kind.replace("_", " "))
            plans += [
                self._planned(kind, plan, divergence, fit.interaction)
                for plan, divergence in zip(drawn, found, strict=True)
            ]
        return ProbeRecord(
            model=ProbedModel(
                source=str(options.hf or options.checkpoint),
                dtype=options.dtype,
                architecture=policy.architecture,
            ),
            answers=answers,
            parts=tuple(parts),
            times=times,
            interaction=FittedInteraction(
                scale=fit.interaction.scale,
                exponent=fit.interaction.exponent,
                spread=fit.spread,
                largest_kl=largest,
            ),
            plans=tuple(plans),
            advice=tuple(advices),
            law=self._law_advice(law, parts),
            environment=environment_report(policy.context.world_size),
        )

    def compare(self, record: ProbeRecord) -> tuple[ComparedLaw, ...]:
        """Laws side by side at the budgets that were asked for."""
        budgets, stages = self._options.compare_budgets, self._policy.stage_of_layer
        return compare_laws(record, budgets, stages, self._options.seed, self._measure)

    def _single_parts(self) -> list[ProbedPart]:
        layers = range(self._num_layers)
        entries: list[tuple[int, Part]] = [(layer, part) for part in PARTS for layer in layers]
        plans = [LayerSkipPlan(self._num_layers, frozenset({entry})) for entry in entries]
        seconds = self._times.part_seconds
        found = self._measure(plans, "one part")
        return [
            ProbedPart(layer=layer, part=part, seconds=seconds[part], **divergence.model_dump())
            for (layer, part), divergence in zip(entries, found, strict=True)
        ]

    def _random_layers(self, parts: Sequence[ProbedPart]) -> tuple[list[Advice], list[ProbedPlan]]:
        """Advice for each kind of part, from k random ones of its insensitive layers."""
        advices: list[Advice] = []
        measured: list[ProbedPlan] = []
        for part in PARTS:
            kls = [p.kl for p in parts if p.part == part]
            rough = recommend(kls, KlInteraction(), self._options.kl_budget)
            plans = self._random_plans(part, rough)
            found = self._measure(plans, f"random {part}")
            totals = [self._total(plan) for plan in plans]
            fit = InteractionFit(KlInteraction(), 0.0)
            if len(plans) >= 3:
                fit = fit_interaction(totals, [d.kl for d in found])
            measured += [
                self._planned("random", plan, divergence, fit.interaction, part)
                for plan, divergence in zip(plans, found, strict=True)
            ]
            advice = recommend(kls, fit.interaction, self._options.kl_budget)
            advices.append(
                Advice(
                    part=part,
                    border_layers=advice.border_layers,
                    protected_layers=advice.protected,
                    num_skipped=advice.num_skipped,
                    predicted_kl=advice.predicted_kl,
                    speedup=self._times.even_speedup(part, advice.num_skipped),
                )
            )
        return advices, measured

    def _random_plans(self, part: Part, advice: Recommendation) -> list[LayerSkipPlan]:
        plans: list[LayerSkipPlan] = []
        free = self._num_layers - 2 * advice.border_layers - len(advice.protected)
        # Under a small budget every layer counts as sensitive; then any will do.
        border, protected = (advice.border_layers, advice.protected) if free else (0, ())
        for number in self._options.random_numbers:
            if number > (free or self._num_layers):
                continue
            for draw in range(self._options.draws):
                key = (self._options.seed, _RANDOM, PARTS.index(part), number, draw)
                plans.append(
                    draw_plan(
                        "uniform",
                        self._num_layers,
                        number,
                        border,
                        self._policy.stage_of_layer,
                        key,
                        part,
                        protected_layers=protected,
                    )
                )
        return list(dict.fromkeys(plans))

    def _calibration_plans(self, kl_budget: float) -> list[LayerSkipPlan]:
        """Plans of the law that takes sums for KLs, at several shares of the budget."""
        plans: list[LayerSkipPlan] = []
        for place, level in enumerate(_LEVELS):
            law = self._law(level * kl_budget, KlInteraction())
            number = self._options.calibration // len(_LEVELS)
            plans += self._draw(law, number, _CALIBRATION * 100 + place)
        return plans

    def _fit(
        self, calibration: Sequence[LayerSkipPlan], random: Sequence[ProbedPlan]
    ) -> tuple[InteractionFit, float]:
        """The interaction, and the largest KL that it was fitted to."""
        found = self._measure(calibration, "calibration")
        totals = [self._total(plan) for plan in calibration]
        kls = [divergence.kl for divergence in found]
        if len(set(calibration)) < 3:
            # The budget buys next to nothing: what random layers say is all there is.
            totals += [plan.total_kl for plan in random]
            kls += [plan.kl for plan in random]
        if not kls:
            return InteractionFit(KlInteraction(), 0.0), self._options.kl_budget
        return fit_interaction(totals, kls), max(kls)

    def _test_fit(
        self, calibration: list[LayerSkipPlan], random: Sequence[ProbedPlan]
    ) -> tuple[list[LayerSkipPlan], list[float]]:
        """Plans that the fit has not seen, and how many times as much as predicted they cost."""
        interaction = self._fit(calibration, random)[0].interaction
        plans = self._held_out(self._law(self._options.kl_budget, interaction), calibration)
        pairs = zip(self._measure(plans, "held out"), plans, strict=True)
        predicted = ((found.kl, interaction.predict(self._total(plan))) for found, plan in pairs)
        return plans, [kl / expected for kl, expected in predicted if min(kl, expected) > 0]

    def _held_out(
        self, law: SensitivityLaw | None, calibration: Sequence[LayerSkipPlan]
    ) -> list[LayerSkipPlan]:
        # More are drawn than wanted: those that the fit has seen test nothing.
        unseen = self._draw(law, 8 * self._options.held_out, _HELD_OUT)
        return [plan for plan in unseen if plan not in calibration][: self._options.held_out]

    def _law(self, kl_budget: float, interaction: KlInteraction) -> SensitivityLaw | None:
        """The law on this policy's stages; None where the budget buys nothing."""
        try:
            return self._law_of(interaction=interaction, kl_budget=kl_budget)
        except ValueError:
            return None

    def _draw(self, law: SensitivityLaw | None, number: int, purpose: int) -> list[LayerSkipPlan]:
        if law is None:
            return []
        plans = [law.draw((self._options.seed, purpose, draw)) for draw in range(number)]
        return list(dict.fromkeys(plans))

    def _law_advice(self, law: SensitivityLaw | None, parts: Sequence[ProbedPart]) -> LawAdvice:
        budget = self._options.kl_budget
        affordable = {p.layer for p in parts if p.kl <= budget}
        drawn = self._draw(law, _ADVICE_DRAWS, _ADVICE)
        return LawAdvice(
            kl_budget=budget,
            num_plans=law.num_plans if law else 0,
            speedup=sum(map(self._times.speedup, drawn)) / len(drawn) if drawn else 1.0,
            predicted_kl=sum(map(law.predicted_kl, drawn)) / len(drawn) if law else 0.0,
            never_skipped=tuple(sorted(set(range(self._num_layers)) - affordable)),
        )

    def _planned(
        self,
        kind: str,
        plan: LayerSkipPlan,
        divergence: Divergence,
        interaction: KlInteraction,
        part: Part | None = None,
    ) -> ProbedPlan:
        total = self._total(plan)
        return ProbedPlan.model_validate(
            {
                "kind": kind,
                "part": part,
                "num_skipped": plan.num_skipped,
                "skipped": plan.describe(),
                "total_kl": total,
                "predicted_kl": interaction.predict(total),
                "speedup": self._times.speedup(plan),
                **divergence.model_dump(),
            }
        )

    def _total(self, plan: LayerSkipPlan) -> float:
        return sum(self._own_kl[entry] for entry in plan.skipped)

    def _measure(self, plans: Sequence[LayerSkipPlan], title: str) -> list[Divergence]:
        """Measure plans, with progress if there is something new."""
        number = self._meter.num_new(plans)
        is_shown = self._policy.context.is_main and number > 0
        done = 0
        with Progress("auto" if is_shown else "off", number, title=f"probe: {title}") as progress:

            def count(finished: int) -> None:
                nonlocal done
                done += finished
                if done == number or done % max(1, number // 10) == 0:
                    progress.update(done, {})

            return self._meter.measure(plans, count)


def _sample_answers(
    policy: Policy,
    prompts: Sequence[Prompt],
    num_samples: int,
    sampling: SamplingParams,
    detokenize: Detokenize | None,
) -> list[Rollout]:
    """The full model's answers to this replica's share of the prompts, without empty ones."""
    context = policy.context
    share = shard_range(len(prompts), context.data.rank, context.data.size)
    batch = RolloutEngine().generate(
        PolicyDecoder(policy),
        prompts[share.start : share.stop],
        num_samples,
        sampling,
        policy.plan,
        first_prompt_index=share.start,
        detokenize=detokenize,
    )
    return [rollout for rollout in batch.rollouts if rollout.token_ids]
