"""The law `sensitivity` from the file of a probe."""

from __future__ import annotations

import logging

from nested_reft_mcore.algorithm.kl_interaction import KlInteraction
from nested_reft_mcore.algorithm.sensitivity import SensitivityLaw, SkipOption
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.probe_record import ProbeRecord, read_sensitivity
from nested_reft_mcore.config.schema import NestedConfig
from nested_reft_mcore.mcore.model import Policy

_log = logging.getLogger(__name__)


def load_sensitivity_law(nested: NestedConfig, policy: Policy) -> SensitivityLaw:
    """Read the probe and make the law of it, for this policy's stages.

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
    return law


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
    num_stages = max(stage_of_layer) + 1
    return SensitivityLaw(
        num_layers=record.model.architecture.num_layers,
        options=tuple(SkipOption(p.layer, p.part, p.kl, p.seconds) for p in record.parts),
        layer_seconds=record.times.layer,
        stage_of_layer=stage_of_layer,
        kl_budget=kl_budget,
        interaction=KlInteraction(record.interaction.scale, record.interaction.exponent),
        stage_extra_seconds=(*[0.0] * (num_stages - 1), record.times.head),
        border_layers=border_layers,
        protected_layers=protected_layers,
        saving_tolerance=saving_tolerance,
    )
