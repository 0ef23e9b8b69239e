"""What the section `nested` asks of itself, of rollouts and of the model."""

from __future__ import annotations

import math

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import Config, NestedConfig


def check_nested(config: Config) -> None:
    """Refuse numbers of layers that are set twice, missing or of no use, whatever the model.

    Raises:
        UserError: names the options, what they say and what would fit.
    """
    nested = config.nested
    if nested.skip_ratio is not None and nested.num_skipped is not None:
        raise UserError(
            f"nested: skip_ratio={nested.skip_ratio} and num_skipped={nested.num_skipped} are both "
            "set; set one of them"
        )
    if nested.law == "sensitivity":
        _check_sensitivity(config)
    elif nested.sensitivity_path is not None or nested.kl_budget is not None:
        name = "sensitivity_path" if nested.sensitivity_path is not None else "kl_budget"
        raise UserError(
            f"nested.{name} is set, but only nested.law=sensitivity uses it; found law={nested.law}"
        )
    elif config.rollout.mode == "speculative" and not (nested.skip_ratio or nested.num_skipped):
        raise UserError(
            "rollout.mode=speculative: the draft comes from the nested policy, and nested skips "
            "nothing; set nested.skip_ratio or nested.num_skipped"
        )


def check_protected(nested: NestedConfig, num_layers: int) -> None:
    """Refuse protected layers that there are not.

    Raises:
        UserError: names the layer.
    """
    for layer in nested.protected_layers:
        if layer >= num_layers:
            raise UserError(
                f"nested.protected_layers: layer {layer} does not exist; the model has "
                f"{num_layers} layers, numbered 0 to {num_layers - 1}"
            )


def num_skipped(nested: NestedConfig, num_layers: int) -> int:
    """k, the number of layers to skip: as given, or round(skip_ratio * num_layers), halves up.

    As `algorithm.layer_skip.num_skipped_layers` rounds, which needs torch. 0 under the law
    `sensitivity`, whose budget decides.
    """
    if nested.num_skipped is not None:
        return nested.num_skipped
    return math.floor((nested.skip_ratio or 0.0) * num_layers + 0.5 + 1e-9)


def _check_sensitivity(config: Config) -> None:
    nested = config.nested
    if nested.skip_ratio is not None or nested.num_skipped is not None:
        name = "skip_ratio" if nested.skip_ratio is not None else "num_skipped"
        raise UserError(
            f"nested.law=sensitivity with nested.{name}={getattr(nested, name)}: nested.kl_budget "
            f"decides how much is skipped; leave {name} out"
        )
    if nested.part != "layer":
        raise UserError(
            f"nested.law=sensitivity with nested.part={nested.part}: this law chooses among "
            "layers, attentions and MLPs by what the probe measured; leave part out"
        )
    for name, meaning in (
        ("sensitivity_path", "the JSON file that `nested-reft probe` writes"),
        ("kl_budget", "the predicted KL of a plan in nats per token, at most"),
    ):
        if getattr(nested, name) is None:
            raise UserError(f"nested.law=sensitivity needs nested.{name}: {meaning}")
    if config.controller.metric != "none":
        raise UserError(
            f"controller.metric={config.controller.metric} steers a number of layers, and "
            "nested.law=sensitivity skips what nested.kl_budget buys; expected "
            "controller.metric=none or another law"
        )
