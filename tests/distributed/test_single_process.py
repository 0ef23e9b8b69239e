"""One process: the stock layer bit for bit, padded vocabulary, flags, going on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_layer import TransformerLayer
from model_cases import (
    NUM_LAYERS,
    VOCAB_SIZE,
    architecture,
    build,
    forward_backward,
    randomize_norms_and_biases,
    training_batch,
)
from padding_cases import padded_vocabulary

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.schema import ModelConfig, OptimizerConfig, ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext, ParallelDimension, RankInfo
from nested_reft_mcore.mcore.checkpoint import (
    load_checkpoint,
    save_weights,
)
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.micro_batches import equal_micro_batches, filled_micro_batches
from nested_reft_mcore.mcore.model import Policy, build_policy
from nested_reft_mcore.mcore.nested_layer import NestedTransformerLayer
from nested_reft_mcore.mcore.optimizer import PolicyOptimizer
from nested_reft_mcore.mcore.pipeline import forward_logits, forward_logprobs
from nested_reft_mcore.mcore.transformer_config import block_spec
from nested_reft_mcore.mcore.weights import initialize_weights
from nested_reft_mcore.training.state import RunState

PARALLEL = ParallelConfig()


@pytest.fixture(scope="module")
def context() -> Iterator[ParallelContext]:
    ranks = RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "single")
    yield initialize_parallel(PARALLEL, ranks, seed=0)
    shutdown()


@pytest.fixture(scope="module")
def policy(context: ParallelContext) -> Policy:
    return build(PARALLEL, context)[0]


def stock_model(policy: Policy) -> GPTModel:
    """The same model of Megatron's own layers, with the same weights and core attention."""
    config, shape = policy.transformer_config, policy.architecture
    spec: Any = block_spec(config, ModelConfig(architecture=shape), None)
    for layer in spec.layer_specs:
        layer.module = TransformerLayer
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=policy.padded_vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        parallel_output=True,
        share_embeddings_and_output_weights=True,
        position_embedding_type="rope",
        rotary_base=shape.rotary_base,  # pyright: ignore[reportArgumentType]
    )
    model.load_state_dict(policy.chunks[0].state_dict())
    return model


def test_skip_of_nothing_is_the_stock_layer_bit_for_bit(context: ParallelContext) -> None:
    shape = architecture()
    # Not wrapped for training: gradients stay where autograd puts them.
    policy = build_policy(shape, ModelConfig(architecture=shape), PARALLEL, context)
    initialize_weights(policy, seed=3)
    randomize_norms_and_biases(policy)
    stock, (nested,) = stock_model(policy), policy.chunks
    assert {type(layer) for layer in stock.decoder.layers} == {TransformerLayer}
    assert {type(layer) for layer in nested.decoder.layers} == {NestedTransformerLayer}
    batch = training_batch()
    weights = torch.randn(8, 12, policy.padded_vocab_size)

    def run(model: GPTModel) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model.zero_grad(set_to_none=True)
        logits = model(batch.tokens, batch.position_ids, None)
        (logits * weights).sum().backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(gradients) > 6 * NUM_LAYERS
        return logits.detach(), gradients

    logits, gradients = run(stock)
    with policy.nested(LayerSkipPlan.full(NUM_LAYERS)):
        nested_logits, nested_gradients = run(nested)
    assert torch.equal(nested_logits, logits)
    assert nested_gradients.keys() == gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.any(), name
        assert torch.equal(nested_gradients[name], gradient), name
    with policy.nested(LayerSkipPlan.parse("3.mlp", NUM_LAYERS)):
        assert not torch.equal(run(nested)[0], logits)


@pytest.mark.parametrize("case", ["tied", "untied"])
def test_padding_of_the_vocabulary(context: ParallelContext, case: str) -> None:
    found = padded_vocabulary(PARALLEL, context)[case]
    assert found.num_padded_rows == 128 - VOCAB_SIZE
    assert found.padded_gradient == 0
    assert found.real_gradient > 0


def test_flags_are_restored_also_after_an_error(policy: Policy) -> None:
    def flags() -> list[tuple[bool, bool]]:
        return [(layer.skip_attention, layer.skip_mlp) for layer in policy.layers]

    whole = [(False, False)] * NUM_LAYERS
    outer = LayerSkipPlan.parse("2,4.attention", NUM_LAYERS)
    inner = LayerSkipPlan.parse("5.mlp", NUM_LAYERS)
    assert flags() == whole

    def leave_by_an_error() -> None:
        with policy.nested(outer):
            with contextlib.suppress(KeyError), policy.nested(inner):
                assert flags() == [*whole[:5], (False, True), *whole[6:]]
                raise KeyError
            assert policy.plan == outer
            assert flags() == [*whole[:2], (True, True), whole[0], (True, False), *whole[5:]]
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        leave_by_an_error()
    assert policy.plan == LayerSkipPlan.full(NUM_LAYERS)
    assert flags() == whole
    with (
        pytest.raises(ValueError, match="plan is for 4 layers, the policy has 8"),
        policy.nested(LayerSkipPlan.full(4)),
    ):
        pass
    assert flags() == whole


def test_too_many_broken_updates_in_a_row_end_the_run() -> None:
    state = RunState(step=7)
    for applied in (False, False, True, False, False):
        state.count(applied, limit=3)
    assert (state.skipped_updates, state.skipped_in_a_row) == (4, 2)
    with pytest.raises(RuntimeError, match=r"step 7: 3 updates in a row .* was not finite"):
        state.count(False, limit=3)


def test_saving_a_nested_policy_is_refused(policy: Policy, tmp_path: Path) -> None:
    with (
        policy.nested(LayerSkipPlan.parse("3", NUM_LAYERS)),
        pytest.raises(RuntimeError, match="the policy is not whole"),
    ):
        save_weights(policy, tmp_path / "nested")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
def test_a_run_stopped_before_its_first_step_goes_on(
    context: ParallelContext, tmp_path: Path, distributed: bool
) -> None:
    config = OptimizerConfig(lr=1e-2, use_distributed_optimizer=distributed)
    full = LayerSkipPlan.full(NUM_LAYERS)

    def train(policy: Policy, optimizer: PolicyOptimizer) -> list[torch.Tensor]:
        for _ in range(2):
            forward_backward(policy, optimizer, full, training_batch())
            assert optimizer.step().applied
        policy.sync_parameters()
        return [parameter.detach().clone() for parameter in policy.chunks[0].parameters()]

    policy, optimizer = build(PARALLEL, context, optimizer=config)
    save_weights(policy, tmp_path / "saved", optimizer=optimizer, state={"step": 0})
    uninterrupted = train(policy, optimizer)
    resumed, its_optimizer = build(PARALLEL, context, optimizer=config)
    initialize_weights(resumed, seed=99)
    assert load_checkpoint(resumed, its_optimizer, tmp_path / "saved") == {"step": 0}
    for found, expected in zip(train(resumed, its_optimizer), uninterrupted, strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("distributed", [False, True], ids=["replicated", "distributed"])
def test_a_resumed_run_follows_its_own_configuration(
    context: ParallelContext, tmp_path: Path, distributed: bool
) -> None:
    spread = {"use_distributed_optimizer": distributed}
    full = LayerSkipPlan.full(NUM_LAYERS)
    decaying = OptimizerConfig(lr=1e-2, lr_decay_style="linear", **spread)
    policy, optimizer = build(PARALLEL, context, optimizer=decaying)
    for _ in range(2):
        forward_backward(policy, optimizer, full, training_batch())
        optimizer.step()
    save_weights(policy, tmp_path / "saved", optimizer=optimizer, state={"step": 2})
    options = {"lr": 4e-3, "min_lr": 1e-3, "adam_beta2": 0.9, "weight_decay": 0.3}
    changed = OptimizerConfig(**options, lr_decay_style="linear", **spread)
    policy, optimizer = build(PARALLEL, context, optimizer=changed)
    load_checkpoint(policy, optimizer, tmp_path / "saved")
    for group in optimizer.megatron.param_groups:
        assert group["betas"] == (0.9, 0.9)
        assert group["weight_decay"] in (0.0, 0.3)
    forward_backward(policy, optimizer, full, training_batch())
    # Two of ten steps from 4e-3 to 1e-3.
    assert optimizer.step().lr == pytest.approx(3.4e-3)


def test_micro_batches_for_an_interleaved_schedule(context: ParallelContext) -> None:
    """Four stages want a multiple of four: three rows are not enough, and nothing is added."""
    interleaved = replace(context, num_chunks=2, pipeline=ParallelDimension(0, 4, (0, 1, 2, 3)))
    batch = training_batch(num_sequences=3)
    made = filled_micro_batches(batch, 12, 12, interleaved)
    assert len(made.batches) == len(made.rows) == 4
    assert sorted(made.rows) == [(), (0,), (1,), (2,)]
    assert {micro_batch.tokens.shape for micro_batch in made.batches} == {(1, 12)}
    assert not made.batches[-1].response_mask.any()
    assert made.num_tokens == sum(batch.lengths())
    assert sum(b.num_response_tokens for b in made.batches) == batch.num_response_tokens
    equal = equal_micro_batches(batch, 2, interleaved)
    assert equal.rows == ((0, 1), (2,), (), ())
    assert equal.num_tokens == made.num_tokens
    assert equal.num_places == 4 * 2 * 12


@pytest.mark.parametrize("options", [{}, {"max_tokens_per_micro_batch": 25}])
def test_scores_are_those_of_the_logits(policy: Policy, options: dict[str, int]) -> None:
    batch = training_batch()
    logits = forward_logits(policy, batch.tokens)
    assert logits is not None
    rows = (logits / 0.7).log_softmax(-1)
    expected = rows.gather(-1, batch.labels[..., None])[..., 0]
    settings = {"micro_batch_size": 3, "temperature": 0.7, "logprob_chunk_tokens": 5}
    found = forward_logprobs(policy, batch, **settings, **options)
    torch.testing.assert_close(found, torch.where(batch.response_mask, expected, 0.0))
    # Nothing stays switched over.
    assert policy.chunks[0](batch.tokens, batch.position_ids, None).shape == (8, 12, 128)
