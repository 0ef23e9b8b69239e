"""The memory model by hand, for the shape and layout of the 7B example."""

from __future__ import annotations

from pathlib import Path

import pytest

import nested_reft_mcore
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.planning.activations import chunks_in_flight
from nested_reft_mcore.planning.layer_costs import LayerShape
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.memory import host_memory, rank_memory
from nested_reft_mcore.planning.run_plan import make_plan

EXAMPLES = Path(nested_reft_mcore.__file__).parents[1] / "examples"
CONFIG = EXAMPLES / "qwen2.5_math_7b" / "config.yaml"
HIDDEN, QUERY, KEY, FFN, ROWS = 3584, 3584 // 4, 512 // 4, 18944 // 4, 152064 // 4
# Attention: queries, keys, values with biases, projection, norm; MLP: three matrices, norm.
ATTENTION = HIDDEN * (QUERY + 2 * KEY) + (QUERY + 2 * KEY) + QUERY * HIDDEN + HIDDEN
MLP = 3 * HIDDEN * FFN + HIDDEN
PARAMETERS = 28 * (ATTENTION + MLP) + HIDDEN + 2 * ROWS * HIDDEN
TOKENS = 8192
# Half of a token's bytes: two norms and two products keep 4 * hidden / 4 ranks (sequence parallel);
# queries, keys and values before the rotation, queries and keys after it, the attention's output;
# gate and up, and their product.
ELEMENTS = 4 * HIDDEN // 4 + (QUERY + 2 * KEY) + (QUERY + KEY) + QUERY + 3 * FFN


def plan_of(*overrides: str, nodes: int = 1, hardware: str = "h100", memory: float | None = None):
    return make_plan(load_config(CONFIG, overrides), nodes, 8, memory, hardware)


def test_parameters_of_the_published_model():
    layout = plan_of().layout
    assert layout.model_parameters == 7_615_616_512
    assert layout.parameters(0) == PARAMETERS == 1_904_057_344


def test_weights_gradients_optimizer_by_hand():
    static = plan_of().ranks[0].static
    assert static.weights == 2 * PARAMETERS
    assert static.gradients == 4 * PARAMETERS
    # Float32 master and two moments, over two replicas.
    assert static.optimizer == 12 * PARAMETERS // 2
    replicated = plan_of(
        "optimizer.use_distributed_optimizer=false", "optimizer.overlap_param_gather=false"
    )
    assert replicated.ranks[0].static.optimizer == 12 * PARAMETERS
    wide = plan_of("model.dtype=float32").ranks[0].static
    assert (wide.weights, wide.optimizer) == (4 * PARAMETERS, 8 * PARAMETERS // 2)


def test_activations_by_hand():
    update = plan_of().ranks[0].update
    # One float32 a head and token for the attention, one a token for each of two norms (over 4).
    per_layer = TOKENS * (2 * ELEMENTS + 4 * 7 + 2 * 4 // 4)
    # Cosine and sine, for queries and for keys, of the longest sequence in heads of 128.
    per_layer += 4 * 4096 * 128 * 2
    # The final norm, its output spread over the ranks, and whole.
    head = TOKENS * HIDDEN * 2 // 4 + TOKENS * 4 // 4 + TOKENS * HIDDEN * 2 * 5 // 4
    assert update.activations == 28 * per_layer + head
    # 128 MiB of float32 logits a chunk: in bfloat16, in float32, shifted, and the last chunk's.
    chunk = 2**27 // (4 * ROWS)
    assert update.logits == chunk * ROWS * (2 + 4 + 4 + 4)
    # The output matrix's gradient in float32 and a chunk's share; gradient of the hidden states.
    assert update.working == ROWS * HIDDEN * 6 + TOKENS * HIDDEN * 2


def test_recomputation_keeps_the_layers_inputs_only():
    options = (
        "model.recompute_granularity=full",
        "model.recompute_method=uniform",
        "model.recompute_num_layers=1",
    )
    update = plan_of(*options).ranks[0].update
    stream = TOKENS * HIDDEN * 2 // 4
    head = stream + TOKENS * 4 // 4 + 5 * stream
    assert update.activations == 28 * stream + head
    blocks = plan_of(*options[:1], "model.recompute_method=block", "model.recompute_num_layers=20")
    assert update.activations < blocks.ranks[0].update.activations
    assert blocks.ranks[0].update.activations < plan_of().ranks[0].update.activations


def test_keys_and_values_by_hand():
    # 4 of 28 layers are skipped: 24 attend, with keys and values of one group in bfloat16.
    rank = plan_of().ranks[0]
    assert rank.rollout.bytes_per_slot == 24 * 4095 * 2 * KEY * 2
    assert rank.rollout.slots == 256
    assert rank.evaluation is not None
    assert rank.evaluation.bytes_per_slot == 28 * 4095 * 2 * KEY * 2
    # Drafts of up to 8 tokens, under the full policy's cache.
    lossless = plan_of("rollout.mode=speculative").ranks[0].rollout
    assert lossless.bytes_per_slot == 28 * 4103 * 2 * KEY * 2
    few = plan_of("rollout.kv_cache_gb=1.0").ranks[0].rollout
    assert few.slots == 10**9 // few.bytes_per_slot


def test_host_memory_by_hand():
    plan = plan_of("algorithm.kl_loss_coef=0.01")
    assert plan.host.reference == 8 * 2 * PARAMETERS
    # The first replica's four ranks hold the gathered state twice, and the weights.
    assert plan.host.saving == 4 * (24 + 2) * PARAMETERS + 4 * 12 * PARAMETERS
    config = load_config(CONFIG, ["checkpoint.async_save=false"])
    assert host_memory(config, plan.layout).saving == (4 * 14 + 4 * 12) * PARAMETERS


def test_micro_batches_in_flight():
    config = load_config(EXAMPLES / "llama3.1_70b" / "config.yaml")
    layout = make_plan(config, 4, 8).layout
    assert [chunks_in_flight(layout, stage, 64) for stage in range(4)] == [4, 3, 2, 1]
    assert [chunks_in_flight(layout, stage, 2) for stage in range(4)] == [2, 2, 2, 1]
    virtual = Layout(layout.architecture, 8, 4, 2, 1, True, 8)
    # 2 * (stages behind) + (chunks - 1) * stages ahead, and one.
    assert [chunks_in_flight(virtual, stage, 64) for stage in range(4)] == [11, 9, 7, 5]


def test_tied_embeddings_have_a_copy_on_the_last_of_several_stages():
    config = load_config(EXAMPLES / "qwen2.5_math_1.5b" / "config.yaml")
    one = make_plan(config, 1, 8).layout
    assert one.parameters(0) == one.model_parameters == 1_543_714_304
    two = Layout(one.architecture, 1, 2, 1, 4, False, 8)
    copy = 151_936 // 128 * 128 * 1536
    assert two.parameters(0) + two.parameters(1) == one.model_parameters + copy


def test_without_sequence_parallelism_norms_are_kept_whole():
    spread, whole = (
        plan_of(f"parallel.sequence_parallel={value}").ranks[0].update
        for value in ("true", "false")
    )
    difference = 28 * TOKENS * 3 * (4 * HIDDEN * 2 + 2 * 4) // 4
    head = TOKENS * 3 * (2 * HIDDEN * 2 + 4) // 4
    # Sequence parallelism rounds the longest sequence up from 4095 to a multiple of 4.
    place = 28 * 4 * 128 * 2
    assert whole.activations - spread.activations == difference + head - place


def test_plain_operators_keep_more_than_fused_ones():
    plan = plan_of()
    fused, plain = (
        rank_memory(plan.config, plan.layout, 0, plan.room, k) for k in ("fused", "cpu")
    )  # type: ignore[arg-type]
    assert plain.update.activations > fused.update.activations


@pytest.mark.parametrize("tensor", [1, 2, 4])
def test_shares_of_a_layer_add_up(tensor: int):
    shape = plan_of().layout.architecture
    whole, share = LayerShape.of(shape, 1), LayerShape.of(shape, tensor)
    norms = 2 * shape.hidden_size
    assert tensor * (share.parameters - norms) == whole.parameters - norms
