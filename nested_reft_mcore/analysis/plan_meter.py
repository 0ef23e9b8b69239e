"""The divergence of many plans over a set of sampled answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.probe_record import Divergence
from nested_reft_mcore.mcore.divergence import DivergenceMeter
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.rollout.batch import TrainingBatch
from nested_reft_mcore.rollout.types import Rollout
from nested_reft_mcore.training.chunks import cut
from nested_reft_mcore.training.replicas import gather_from_replicas

_MICRO_BATCHES_PER_STAGE = 4
"""In one pipelined pass: its start and end leave stages idle."""


class PlanMeter:
    """Measures plans at the response tokens of this replica's answers, and averages over replicas.

    A plan is measured once; the full policy runs again for each call and each chunk of answers, so
    that its distributions need not be held for all of them.
    """

    def __init__(
        self,
        policy: Policy,
        answers: Sequence[Rollout],
        *,
        batch_size: int,
        temperature: float,
        pad_to_multiple: int = 1,
    ) -> None:
        """`batch_size`: sequences in one forward pass."""
        self._policy = policy
        self._batch_size = batch_size
        self._temperature = temperature
        self._pad_to_multiple = pad_to_multiple
        # The longest first: what does not fit into memory shows at once.
        self._answers = sorted(
            answers, key=lambda answer: -len(answer.prompt.token_ids) - len(answer.token_ids)
        )
        self._known: dict[LayerSkipPlan, Divergence] = {}

    def measure(
        self, plans: Sequence[LayerSkipPlan], measured: Callable[[int], None] | None = None
    ) -> list[Divergence]:
        """The divergence of each plan, the same on every process; every process has to call it.

        `measured` is told the number of plans that were run on a chunk, scaled to whole plans.

        Raises:
            UserError: a policy's probabilities are not finite.
        """
        new = [plan for plan in dict.fromkeys(plans) if plan not in self._known]
        if new:
            sums = self._run(new, measured or (lambda _: None))
            replicas = gather_from_replicas(sums, self._policy.context)
            kl, overlap, tokens = torch.cat(replicas, dim=-1).unbind(1)
            for index, plan in enumerate(new):
                self._known[plan] = _average(plan, kl[index], overlap[index], tokens[index])
        return [self._known[plan] for plan in plans]

    def num_new(self, plans: Sequence[LayerSkipPlan]) -> int:
        """How many of the plans are not measured yet."""
        return len({plan for plan in plans if plan not in self._known})

    def _run(self, plans: Sequence[LayerSkipPlan], measured: Callable[[int], None]) -> Tensor:
        """KL, overlap and tokens of each plan and answer, `[plans, 3, answers]` float64."""
        stages = self._policy.context.pipeline.size
        rows = self._batch_size * (1 if stages == 1 else stages * _MICRO_BATCHES_PER_STAGE)
        columns: list[Tensor] = []
        num_runs, num_told = 0, 0
        chunks = list(cut(len(self._answers), rows))
        for chunk in chunks:
            answers = self._answers[chunk.start : chunk.stop]
            batch = TrainingBatch.from_rollouts(
                answers,
                advantages=torch.zeros(len(answers)),
                pad_token_id=0,
                pad_to_multiple=self._pad_to_multiple,
            )
            meter = DivergenceMeter(
                self._policy,
                batch,
                micro_batch_size=self._batch_size,
                temperature=self._temperature,
            )
            found: list[Tensor] = []
            for plan in plans:
                sums = meter.measure(plan)
                found.append(torch.stack([sums.kl, sums.overlap, meter.num_tokens]))
                num_runs += 1
                whole = num_runs // len(chunks)
                if whole > num_told:
                    measured(whole - num_told)
                    num_told = whole
            columns.append(torch.stack(found))
        return torch.cat(columns, dim=-1)


def _average(plan: LayerSkipPlan, kl: Tensor, overlap: Tensor, tokens: Tensor) -> Divergence:
    """Means over tokens; the error of a ratio of sums over independent answers."""
    total = float(tokens.sum())
    mean = float(kl.sum()) / total
    if not math.isfinite(mean):
        raise UserError(
            f"skipping {plan.describe()} gives a KL of {mean}; expected a finite number: are the "
            "model's weights finite?"
        )
    count = len(tokens)
    squares = float(((kl - mean * tokens) ** 2).sum())
    error = math.sqrt(squares * count / max(1, count - 1)) / total
    return Divergence(kl=mean, kl_error=error, overlap=float(overlap.sum()) / total)
