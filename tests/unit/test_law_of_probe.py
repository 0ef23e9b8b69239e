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
    ProbeRecord,
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
        answers=SimpleNamespace(temperature=0.7),
        held_out_ratios=[],
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
    assert sensitivity_law.load_sensitivity_law(config, policy(), 0.7) == SensitivityLaw(
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


@pytest.mark.parametrize(
    ("budget", "noise", "few", "loud"),
    # 0.5 * 0.15 ** 1.25 and 0.5 * 0.28 ** 1.25 nats: any one part, or any two of them.
    [(0.12, 0.1, False, False), (0.12, 0.3, False, True), (0.0282, 0.0, True, False)],
)
def test_a_run_hears_of_little_chance_and_of_times_that_are_noise(
    budget: float, noise: float, few: bool, loud: bool, monkeypatch: Any, caplog: Any
) -> None:
    times = RECORD.times.model_copy(update={"noise": noise})
    law = law_of_main({"times": times}, budget, monkeypatch)
    assert (law.num_plans < 5) == few
    warned = warnings_in(caplog)
    assert any("hardly anything changes" in text for text in warned) == few
    assert any("probe.json are mostly noise" in text for text in warned) == loud


@pytest.mark.parametrize("costs", [(), (0.05, 0.19), (0.05, 0.21, 0.8)])
def test_a_run_hears_of_plans_that_cost_more_than_predicted(
    costs: tuple[float, ...], monkeypatch: Any, caplog: Any
) -> None:
    plans = [SimpleNamespace(kind="held_out", kl=cost, predicted_kl=0.1) for cost in costs]
    fitted = SimpleNamespace(kind="calibration", kl=9.0, predicted_kl=0.1)
    record = cast(Any, SimpleNamespace(plans=(fitted, *plans)))
    ratios = cast(Any, ProbeRecord.held_out_ratios).fget(record)
    law_of_main({"held_out_ratios": ratios}, 0.12, monkeypatch)
    warned = [text for text in warnings_in(caplog) if "tested the fit" in text]
    if max(costs, default=0) < 0.2:
        assert not warned
    else:
        assert "2 of 3 plans that tested the fit of probe.json" in warned[0]
        assert "up to 8.0 times: nested.kl_budget=0.12 bounds predictions" in warned[0]


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_run_hears_of_a_probe_at_another_temperature(
    temperature: float, monkeypatch: Any, caplog: Any
) -> None:
    law_of_main({"answers": SimpleNamespace(temperature=temperature)}, 0.12, monkeypatch)
    warned = [text for text in warnings_in(caplog) if "at temperature" in text]
    assert len(warned) == (temperature != 0.7)
    for text in warned:
        assert "are at temperature 1, the rollouts at rollout.temperature=0.7" in text


def law_of_main(changes: dict[str, Any], budget: float, monkeypatch: Any) -> SensitivityLaw:
    """What the process that speaks makes of a probe that differs from RECORD."""
    record = SimpleNamespace(**{**vars(RECORD), **changes})
    monkeypatch.setattr(sensitivity_law, "read_sensitivity", lambda *_: record)
    made = policy()
    made.stage_of_layer, made.context = (0,) * 8, SimpleNamespace(is_main=True)
    config = nested(kl_budget=budget, border_layers=0)
    return sensitivity_law.load_sensitivity_law(config, made, 0.7)


def warnings_in(caplog: Any) -> list[str]:
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def test_a_budget_that_buys_nothing_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"law=sensitivity with probe\.json: .*the cheapest, "):
        sensitivity_law.load_sensitivity_law(nested(kl_budget=1e-4, border_layers=0), policy(), 0.7)
