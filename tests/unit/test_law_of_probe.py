"""The law of a probe has the probe's numbers and the limits of the configuration."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from nested_reft_mcore.algorithm.kl_interaction import KlInteraction
from nested_reft_mcore.algorithm.sensitivity import SensitivityLaw, SkipOption
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.probe_record import (
    DecodeTimes,
    FittedInteraction,
    ProbedPart,
)
from nested_reft_mcore.config.schema import NestedConfig
from nested_reft_mcore.training import sensitivity_law

STAGES = (0, 0, 0, 0, 1, 1, 1, 1)
RECORD = cast(
    Any,
    SimpleNamespace(
        parts=tuple(
            ProbedPart(
                layer=layer,
                part="layer",
                kl=0.1 + 0.01 * layer,
                kl_error=0.0,
                overlap=0.9,
                seconds=2.0,
            )
            for layer in range(8)
        ),
        times=DecodeTimes(
            context_length=8,
            num_sequences=1,
            step=19.0,
            layer=2.0,
            attention=1.0,
            mlp=1.0,
            head=3.0,
            tensor_model_parallel_size=1,
        ),
        interaction=FittedInteraction(scale=0.5, exponent=1.25, spread=0.0, largest_kl=9.0),
    ),
)
OPTIONS = tuple(SkipOption(layer, "layer", 0.1 + 0.01 * layer, 2.0) for layer in range(8))


def policy() -> Any:
    return SimpleNamespace(
        architecture=None, stage_of_layer=STAGES, context=SimpleNamespace(is_main=False)
    )


def nested(**options: Any) -> NestedConfig:
    return NestedConfig(law="sensitivity", sensitivity_path="probe.json", **options)


@pytest.fixture(autouse=True)
def probe(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sensitivity_law, "read_sensitivity", lambda *_: RECORD)


def test_every_number_arrives() -> None:
    config = nested(kl_budget=0.2, border_layers=1, protected_layers=(5,), saving_tolerance=0.4)
    assert sensitivity_law.load_sensitivity_law(config, policy()) == SensitivityLaw(
        num_layers=8,
        options=OPTIONS,
        layer_seconds=2.0,
        stage_of_layer=STAGES,
        kl_budget=0.2,
        interaction=KlInteraction(scale=0.5, exponent=1.25),
        # The head counts on the last stage.
        stage_extra_seconds=(0.0, 3.0),
        border_layers=1,
        protected_layers=(5,),
        saving_tolerance=0.4,
    )


def test_a_budget_that_buys_nothing_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"law=sensitivity with probe\.json: .*the cheapest, "):
        sensitivity_law.load_sensitivity_law(nested(kl_budget=1e-4, border_layers=0), policy())
