"""The law `sensitivity` from the file of a probe."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from nested_reft_mcore.algorithm.kl_interaction import KlInteraction
from nested_reft_mcore.algorithm.sensitivity import SensitivityLaw, SkipOption
from nested_reft_mcore.algorithm.skip_schedule import head_on_last_stage
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.probe_record import (
    DecodeTimes,
    ProbedPart,
    ProbeRecord,
    read_sensitivity,
)
from nested_reft_mcore.config.schema import NestedConfig
from nested_reft_mcore.mcore.model import Policy

_log = logging.getLogger(__name__)

_FEW_PLANS = 5
"""Fewer are drawn again within a few batches."""
_FAR_OFF = 2.0
"""A plan that costs so many times what was predicted is worth a word."""


def load_sensitivity_law(
    nested: NestedConfig, policy: Policy, temperature: float
) -> SensitivityLaw:
    """Read the probe and make the law of it, for this policy's stages and rollouts.

    Raises:
        UserError: the file is missing or of another model, or the budget buys nothing.
    """
    assert nested.kl_budget is not None, "checked before any process started"
    record = read_sensitivity(nested, policy.architecture)
    try:
        law = sensitivity_law(
            record,
            nested.kl_budget,
            policy.stage_of_layer,
            border_layers=nested.border_layers,
            protected_layers=nested.protected_layers,
            saving_tolerance=nested.saving_tolerance,
        )
    except ValueError as error:
        raise UserError(f"nested.law=sensitivity with {nested.sensitivity_path}: {error}") from None
    if policy.context.is_main:
        _log.info(
            "sensitivity: %d plans within %g nats per token; the slowest stage is predicted to be "
            "%.2fx as fast",
            law.num_plans,
            nested.kl_budget,
            law.predicted_speedup(law.draw((0,))),
        )
        _warn(law, record, nested, temperature)
    return law


def _warn(
    law: SensitivityLaw, record: ProbeRecord, nested: NestedConfig, temperature: float
) -> None:
    """Of what makes the law less than it promises: little chance, and what the probe got wrong."""
    if law.num_plans < _FEW_PLANS:
        _log.warning(
            "sensitivity: with so few plans (%d) hardly anything changes from batch to batch; "
            "expected at least %d: raise nested.saving_tolerance=%g or nested.kl_budget=%g",
            law.num_plans,
            _FEW_PLANS,
            nested.saving_tolerance,
            nested.kl_budget,
        )
    if record.answers.temperature != temperature:
        _log.warning(
            "sensitivity: the KLs in %s are at temperature %g, the rollouts at "
            "rollout.temperature=%g: nested.kl_budget=%g does not bound what they differ by; probe "
            "again with --temperature %g",
            nested.sensitivity_path,
            record.answers.temperature,
            temperature,
            nested.kl_budget,
            temperature,
        )
    if record.times.is_noise:
        _log.warning(
            "sensitivity: the times in %s are mostly noise (%.0f%% of what all layers take), and "
            "so is which parts save the most: probe again on an idle machine, or with more "
            "--repeats",
            nested.sensitivity_path,
            100 * record.times.noise,
        )
    ratios = record.held_out_ratios
    far_off = [ratio for ratio in ratios if ratio > _FAR_OFF]
    if far_off:
        _log.warning(
            "sensitivity: %d of %d plans that tested the fit of %s cost more than %g times the KL "
            "predicted, up to %.1f times: nested.kl_budget=%g bounds predictions, and batches with "
            "such plans will be above it (rollout_corr/kl); lower it, or probe again with more "
            "--calibration plans",
            len(far_off),
            len(ratios),
            nested.sensitivity_path,
            _FAR_OFF,
            max(far_off),
            nested.kl_budget,
        )


def sensitivity_law(
    record: ProbeRecord,
    kl_budget: float,
    stage_of_layer: tuple[int, ...],
    *,
    border_layers: int = 0,
    protected_layers: tuple[int, ...] = (),
    saving_tolerance: float = 0.2,
) -> SensitivityLaw:
    """The law of a probe for a layout; the head counts on the last stage. ValueError as it says."""
    return law_of_parts(
        record.parts,
        record.times,
        KlInteraction(record.interaction.scale, record.interaction.exponent),
        kl_budget,
        stage_of_layer,
        border_layers=border_layers,
        protected_layers=protected_layers,
        saving_tolerance=saving_tolerance,
    )


def law_of_parts(
    parts: Sequence[ProbedPart],
    times: DecodeTimes,
    interaction: KlInteraction,
    kl_budget: float,
    stage_of_layer: tuple[int, ...],
    **restrictions: Any,
) -> SensitivityLaw:
    """The same before there is a record; `restrictions` are options of `SensitivityLaw`."""
    return SensitivityLaw(
        num_layers=len(stage_of_layer),
        options=tuple(SkipOption(p.layer, p.part, p.kl, p.seconds) for p in parts),
        layer_seconds=times.layer,
        stage_of_layer=stage_of_layer,
        kl_budget=kl_budget,
        interaction=interaction,
        stage_extra_seconds=head_on_last_stage(times.head, max(stage_of_layer) + 1),
        **restrictions,
    )
