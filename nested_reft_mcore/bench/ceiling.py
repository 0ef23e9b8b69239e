"""What skipping can gain at most: the measured share of the time that is skippable work.

T0 is the time at full depth, T_all that of the same generation with every layer (or every
attention, or every MLP) skipped. T0 - T_all is the skippable work. Skipping a share s of it leaves
T0 - s (T0 - T_all), so the speed-up cannot exceed T0 / (T0 - s (T0 - T_all)).
"""

from __future__ import annotations

from collections.abc import Sequence

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.bench import PartName


def speedup_ceiling(full_seconds: float, all_skipped_seconds: float, share: float) -> float:
    """Largest speed-up of skipping `share` of the skippable work.

    Where skipping everything did not save time, by noise, there is nothing to gain: 1.
    Raises ValueError for a share outside 0 to 1 and for times that are not positive.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must lie in [0, 1], found {share}")
    if full_seconds <= 0 or all_skipped_seconds <= 0:
        raise ValueError(f"times must be positive, found {full_seconds} and {all_skipped_seconds}")
    skippable = max(0.0, full_seconds - all_skipped_seconds)
    return full_seconds / (full_seconds - share * skippable)


def skipped_share(plan: LayerSkipPlan, stage_of_layer: Sequence[int], part: PartName) -> float:
    """The share of a stage's `part` that the plan skips, on the stage that is left the fullest.

    With one stage it is k / L. With several in step the fullest sets the pace, so what other
    stages skip beyond it gains nothing.
    """
    skips = {
        "layer": plan.skips_layer,
        "attention": plan.skips_attention,
        "mlp": plan.skips_mlp,
    }[part]
    shares = []
    for stage in range(max(stage_of_layer) + 1):
        layers = [layer for layer, home in enumerate(stage_of_layer) if home == stage]
        shares.append(sum(map(skips, layers)) / len(layers))
    return min(shares)


def kv_formula_bytes(
    plan: LayerSkipPlan,
    stage_of_layer: Sequence[int],
    num_slots: int,
    length: int,
    num_groups: int,
    head_dim: int,
    bytes_per_number: int,
) -> tuple[int, ...]:
    """Keys and values by stage: 2 x active attentions x slots x length x groups x head size.

    `num_groups`: key-value heads on one tensor-parallel process.
    """
    per_layer = 2 * num_slots * length * num_groups * head_dim * bytes_per_number
    found = [0] * (max(stage_of_layer) + 1)
    for layer, stage in enumerate(stage_of_layer):
        found[stage] += per_layer * (not plan.skips_attention(layer))
    return tuple(found)
