"""What `logging.dump_rollouts` writes: each step's rollouts, with what the updates made of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.dump import Lesson, dump_rollouts, dump_vocabulary, rollout_file
from nested_reft_mcore.rollout.types import RolloutBatch
from nested_reft_mcore.training.experience import Experience
from nested_reft_mcore.training.replicas import is_replica_writer
from nested_reft_mcore.training.run import Run


def write_vocabulary(run: Run) -> None:
    """The text of every token, once a run."""
    if run.config.logging.dump_rollouts and run.context.is_main:
        with run.trouble.writing(rollout_file(run.directory, 0, 0).parent):
            dump_vocabulary(run.directory, run.tokenizer.vocab_size, run.tokenizer.decode)


def write_step(
    run: Run,
    step: int,
    collected: Experience,
    batch: TrainingBatch,
    updates_logprobs: Sequence[Tensor],
    failures: Mapping[tuple[str, str], str],
    components: Mapping[tuple[str, str], Mapping[str, float]],
) -> None:
    """This replica's rollouts of a step that is done.

    `batch` is what was dealt to the updates, `updates_logprobs` the target's log-probs that each of
    them saw, `failures` and `components` what `Judge` gives under these names.
    """
    if not is_replica_writer(run.context):
        return
    rollouts, replica = collected.rollouts, run.context.data.rank
    lessons = _lessons(rollouts, batch, updates_logprobs, failures, components)
    with run.trouble.writing(rollout_file(run.directory, step, replica)):
        dump_rollouts(run.directory, step, replica, rollouts, collected.scores.tolist(), lessons)


def _lessons(
    rollouts: RolloutBatch,
    batch: TrainingBatch,
    updates_logprobs: Sequence[Tensor],
    failures: Mapping[tuple[str, str], str],
    components: Mapping[tuple[str, str], Mapping[str, float]],
) -> list[Lesson]:
    """One for each rollout; row r was dealt to mini-batch r modulo their number."""
    advantages = batch.advantages.tolist()
    is_masked = (~batch.response_mask.any(dim=1)).tolist()
    lessons = []
    for row, rollout in enumerate(rollouts.rollouts):
        update, place = row % len(updates_logprobs), row // len(updates_logprobs)
        start = len(rollout.prompt.token_ids) - 1
        target = updates_logprobs[update][place, start : start + len(rollout.token_ids)]
        key = (rollout.prompt.text, rollout.text)
        lessons.append(
            Lesson(
                advantage=advantages[row],
                target_logprobs=None if is_masked[row] else target.tolist(),
                judge_failure=failures.get(key),
                components=components.get(key),
            )
        )
    return lessons
