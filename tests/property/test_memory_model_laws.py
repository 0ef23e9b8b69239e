"""What the memory model may never do, whatever model and layout."""

from __future__ import annotations

import math
from dataclasses import replace

from hypothesis import assume, given, settings
from hypothesis import strategies as st

from nested_reft_mcore.algorithm.layer_skip import draw_plan, fewest_skipped_per_stage
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    NestedConfig,
    OptimizerConfig,
    RolloutConfig,
    TrainConfig,
)
from nested_reft_mcore.planning.generation_memory import slot_bytes
from nested_reft_mcore.planning.hardware import BUILT_IN
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.memory import rank_memory, static_memory, usable_bytes

ROOM = 80 * 10**9
LAWS = st.sampled_from(["uniform", "stage_balanced"])


@st.composite
def architectures(draw: st.DrawFn) -> ModelArchitecture:
    """Shapes that TP 1 to 8 and PP 1 to 4 divide."""
    groups = 8 * draw(st.integers(1, 2))
    heads = groups * draw(st.integers(1, 4))
    return ModelArchitecture(
        num_layers=8 * draw(st.integers(1, 6)),
        hidden_size=64 * draw(st.integers(1, 64)),
        num_attention_heads=heads,
        num_query_groups=groups,
        kv_channels=2 * draw(st.integers(8, 64)),
        ffn_hidden_size=8 * draw(st.integers(16, 2048)),
        vocab_size=draw(st.integers(100, 200_000)),
        add_qkv_bias=draw(st.booleans()),
        qk_layernorm=draw(st.booleans()),
        untie_embeddings_and_output_weights=draw(st.booleans()),
    )


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """A layout without virtual stages."""
    power = st.sampled_from([1, 2, 4])
    tensor = draw(power)
    return Layout(
        draw(architectures()), tensor, draw(power), 1, draw(power), tensor > 1, gpus_per_node=8
    )


@st.composite
def configs(draw: st.DrawFn) -> Config:
    """What counts for memory."""
    return Config(
        run_dir="unused",
        model=ModelConfig(dtype=draw(st.sampled_from(["float32", "bfloat16"]))),
        data=DataConfig(max_prompt_length=draw(st.integers(1, 500))),
        nested=NestedConfig(num_skipped=draw(st.integers(0, 5)), law=draw(LAWS)),
        rollout=RolloutConfig(
            prompts_per_step=16, group_size=4, max_new_tokens=draw(st.integers(2, 500))
        ),
        optimizer=OptimizerConfig(use_distributed_optimizer=draw(st.booleans())),
        train=TrainConfig(micro_batch_size=draw(st.integers(1, 8))),
    )


@given(configs(), layouts())
def test_more_tensor_ranks_never_need_more_each(config: Config, layout: Layout):
    wider = replace(layout, tensor=2 * layout.tensor)
    for stage in range(layout.pipeline):
        one, other = (static_memory(config, where, stage) for where in (layout, wider))
        # Megatron pads the vocabulary to a multiple of 128 for each rank.
        padding = 2 * 128 * layout.architecture.hidden_size
        assert other.weights <= one.weights + padding * 4
        assert other.gradients <= one.gradients + padding * 4
        assert other.optimizer <= one.optimizer + padding * 12
        kv = [slot_bytes(config, where, 100, stage) for where in (layout, wider)]
        assert kv[1] <= kv[0]


@given(configs(), layouts())
def test_the_distributed_optimizer_never_needs_more(config: Config, layout: Layout):
    def needed(spread: bool) -> list[int]:
        optimizer = OptimizerConfig(use_distributed_optimizer=spread)
        other = config.model_copy(update={"optimizer": optimizer})
        return [static_memory(other, layout, stage).total for stage in range(layout.pipeline)]

    for spread, whole in zip(needed(True), needed(False), strict=True):
        assert spread <= whole
        assert layout.data == 1 or spread < whole


@given(layouts(), LAWS, st.integers(0, 5))
def test_more_skipped_layers_never_need_a_larger_cache(layout: Layout, law, count: int):
    assume(count + 1 <= layout.architecture.num_layers - 2)

    def cache(number: int) -> list[int]:
        config = Config(
            run_dir="unused",
            model=ModelConfig(),
            nested=NestedConfig(num_skipped=number, law=law),
        )
        return [slot_bytes(config, layout, 100, stage) for stage in range(layout.pipeline)]

    fewer, more = cache(count), cache(count + 1)
    assert max(more) <= max(fewer)
    assert sum(more) <= sum(fewer)
    if law == "uniform":
        assert all(m <= f for m, f in zip(more, fewer, strict=True))


@given(layouts(), LAWS, st.integers(0, 20), st.integers(0, 10**6))
@settings(max_examples=200)
def test_no_plan_of_a_law_skips_less_on_a_stage_than_is_said(layout, law, count: int, key: int):
    num_layers = layout.architecture.num_layers
    count = min(count, num_layers - 2)
    least = fewest_skipped_per_stage(law, num_layers, count, 1, layout.stage_of_layer)
    plan = draw_plan(law, num_layers, count, 1, layout.stage_of_layer, (key,))
    taken = [0] * layout.pipeline
    for layer, _ in plan.skipped:
        taken[layout.stage_of_layer[layer]] += 1
    assert all(mine >= floor for mine, floor in zip(taken, least, strict=True))


@given(configs(), layouts())
def test_more_stages_never_hold_fewer_parameters_than_the_model(config: Config, layout: Layout):
    held = layout.tensor * sum(layout.parameters(stage) for stage in range(layout.pipeline))
    assert held >= layout.model_parameters
    # Nothing but copied norms and biases, padding, and a copy of a tied embedding is more.
    copies = (
        layout.tensor
        * layout.architecture.num_layers
        * (2 * layout.architecture.hidden_size + 2 * layout.architecture.head_dim)
    )
    padding = 128 * layout.tensor * layout.architecture.hidden_size * 2
    tied = layout.architecture.vocab_size * layout.architecture.hidden_size
    assert held <= layout.model_parameters + copies + padding + tied + layout.tensor * (
        layout.architecture.hidden_size
    )


@given(configs(), layouts())
def test_every_part_of_a_step_holds_what_is_always_there(config: Config, layout: Layout):
    for stage in range(layout.pipeline):
        memory = rank_memory(config, layout, stage, ROOM)
        assert min(memory.moments.values()) >= memory.static.total
        assert memory.peak[1] == max(memory.moments.values())
        assert math.isfinite(memory.peak[1])


def test_a_reserve_is_kept_of_every_device():
    for profile in BUILT_IN.values():
        assert 0.85 * profile.memory_gb * 1e9 < usable_bytes(profile) < profile.memory_gb * 1e9
