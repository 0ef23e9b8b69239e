"""Rollouts become tensors aligned with labels."""

import pytest
import torch

from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.types import Prompt, Rollout


def rollout(prompt: tuple[int, ...], response: tuple[int, ...], index: int = 0) -> Rollout:
    logprobs = tuple(-0.5 * (i + 1) for i in range(len(response)))
    return Rollout(Prompt(prompt, ""), index, 0, response, logprobs, "stop")


def batch_of(num: int) -> TrainingBatch:
    rollouts = [rollout((1, 2), tuple(range(3, 4 + i)), i) for i in range(num)]
    return TrainingBatch.from_rollouts(rollouts, torch.arange(num) + 1.0, pad_token_id=9)


def test_alignment_with_labels() -> None:
    rollouts = [rollout((5, 6, 7), (8, 9)), rollout((5,), (4,))]
    batch = TrainingBatch.from_rollouts(rollouts, torch.tensor([1.5, -2.0]), pad_token_id=0)
    assert batch.tokens.tolist() == [[5, 6, 7, 8], [5, 0, 0, 0]]
    assert batch.labels.tolist() == [[6, 7, 8, 9], [4, 0, 0, 0]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert batch.response_mask.tolist() == [[False, False, True, True], [True, False, False, False]]
    assert batch.behavior_logprobs.tolist() == [[0, 0, -0.5, -1.0], [-0.5, 0, 0, 0]]
    assert batch.advantages.tolist() == [1.5, -2.0]
    assert batch.num_response_tokens == 3
    assert batch.labels[batch.response_mask].tolist() == [8, 9, 4]


@pytest.mark.parametrize(
    ("multiple", "length", "expected"), [(1, None, 4), (8, None, 8), (2, 6, 6)]
)
def test_padded_length(multiple: int, length: int | None, expected: int) -> None:
    rollouts = [rollout((5, 6, 7), (8, 9))]
    batch = TrainingBatch.from_rollouts(rollouts, torch.ones(1), 0, multiple, length)
    assert batch.tokens.shape == (1, expected)
    assert batch.num_response_tokens == 2


@pytest.mark.parametrize(
    ("rollouts", "num_advantages", "options", "message"),
    [
        ([], 0, {}, "no rollouts"),
        ([rollout((1,), (2,))], 2, {}, "1 rollouts but advantages"),
        ([rollout((), (2,))], 1, {}, "empty prompt"),
        ([rollout((1, 2, 3), (2,))], 1, {"length": 2}, "length 2 must be"),
        ([rollout((1,), (2,))], 1, {"length": 3, "pad_to_multiple": 2}, "a multiple of 2"),
    ],
)
def test_what_does_not_fit_is_refused(rollouts, num_advantages, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingBatch.from_rollouts(rollouts, torch.ones(num_advantages), 0, **options)


@pytest.mark.parametrize(
    ("num", "parts", "sizes"), [(6, 2, [3, 3]), (5, 2, [3, 2]), (4, 4, [1] * 4)]
)
def test_split_keeps_order_and_every_sequence(num: int, parts: int, sizes: list[int]) -> None:
    batch = batch_of(num)
    pieces = batch.split(parts)
    assert [len(piece) for piece in pieces] == sizes
    assert torch.equal(torch.cat([piece.labels for piece in pieces]), batch.labels)
    assert torch.equal(torch.cat([piece.advantages for piece in pieces]), batch.advantages)


@pytest.mark.parametrize("parts", [0, 4])
def test_split_into_too_many_is_refused(parts: int) -> None:
    with pytest.raises(ValueError, match="cannot split 3 sequences"):
        batch_of(3).split(parts)


def test_dealt_rows_do_not_depend_on_replicas() -> None:
    whole = batch_of(8)
    replicas = whole.split(2)
    for number, minibatch in enumerate(whole.deal(2)):
        assert minibatch.advantages.tolist() == [1.0 + number + 2 * i for i in range(4)]
        shares = [replica.deal(2)[number] for replica in replicas]
        assert torch.equal(torch.cat([share.labels for share in shares]), minibatch.labels)
        assert torch.equal(torch.cat([share.advantages for share in shares]), minibatch.advantages)
    with pytest.raises(ValueError, match="cannot deal 8 sequences into 3"):
        whole.deal(3)


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_micro_batches_have_one_shape_and_lose_nothing(size: int) -> None:
    batch = batch_of(5)
    batch = batch.with_old_logprobs(torch.where(batch.response_mask, -3.0, 0.0))
    micro_batches = batch.micro_batches(size)
    assert {m.tokens.shape for m in micro_batches} == {(size, batch.tokens.shape[1])}
    assert len(micro_batches) == -(-5 // size)
    assert sum(m.num_response_tokens for m in micro_batches) == batch.num_response_tokens
    for name in ("tokens", "labels", "position_ids", "behavior_logprobs", "old_logprobs"):
        joined = torch.cat([getattr(m, name) for m in micro_batches])
        assert torch.equal(joined[:5], getattr(batch, name))
    added = torch.cat([m.response_mask for m in micro_batches])[5:]
    assert not added.any()
    assert not torch.cat([m.advantages for m in micro_batches])[5:].any()


def test_micro_batch_size_must_be_positive() -> None:
    with pytest.raises(ValueError, match="micro_batch_size"):
        batch_of(2).micro_batches(0)


def test_old_logprobs_are_kept_apart_from_the_graph_and_checked() -> None:
    batch = batch_of(2)
    scores = torch.zeros(batch.tokens.shape, requires_grad=True)
    assert not batch.with_old_logprobs(scores).old_logprobs.requires_grad
    assert batch.old_logprobs is None
    with pytest.raises(ValueError, match="old_logprobs"):
        batch.with_old_logprobs(scores[:, 1:])


def test_to_moves_every_tensor() -> None:
    moved = batch_of(2).to("meta")
    assert moved.tokens.device.type == moved.advantages.device.type == "meta"
    assert moved.ref_logprobs is None


def test_lengths_are_up_to_the_last_place_that_counts() -> None:
    batch = batch_of(3)
    assert batch.lengths() == [2, 3, 4]
    assert batch.without_responses(torch.tensor([True, False, True])).lengths() == [1, 3, 1]


def test_taken_rows_are_cut_or_padded() -> None:
    batch = batch_of(3)
    cut = batch.take([2, 0], 3)
    assert cut.tokens.tolist() == [[1, 2, 3], [1, 2, 9]]
    assert cut.advantages.tolist() == [3.0, 1.0]
    assert cut.response_mask.tolist() == batch.response_mask[[2, 0], :3].tolist()
    wide = batch.take([1], 6)
    assert wide.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert wide.response_mask[0].tolist() == [False, True, True, False, False, False]
    assert wide.behavior_logprobs.shape == (1, 6)


def test_batches_of_unlike_widths_are_joined() -> None:
    narrow, wide = batch_of(2), batch_of(4)
    joined = TrainingBatch.concatenate([narrow, wide])
    assert len(joined) == 6
    assert joined.lengths() == narrow.lengths() + wide.lengths()
    assert torch.equal(joined.labels[2:], wide.labels)
    assert joined.labels[:2, : narrow.labels.shape[1]].tolist() == narrow.labels.tolist()
