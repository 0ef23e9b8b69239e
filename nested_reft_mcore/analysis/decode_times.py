"""What a layer's attention and MLP take of a decode pass, with the decoder that rollouts use."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.probe_record import DecodeTimes
from nested_reft_mcore.mcore.agreement import barrier, gather_all
from nested_reft_mcore.mcore.decode import PolicyDecoder
from nested_reft_mcore.mcore.model import Policy
from nested_reft_mcore.rollout.sampling import sample_tokens
from nested_reft_mcore.rollout.token_pass import TokenPass
from nested_reft_mcore.rollout.types import SamplingParams

_LEAST_SHARE = 0.05
"""On a busy machine noise can hide what a small model's parts take. All layers count for at least
this share of a pass, and each half of a layer for at least this share of it."""

_MEDIAN_ERROR = 1.2533 * 1.4826
"""Standard error of a median of n normal numbers, in median absolute deviations over sqrt(n)."""


def measure_decode_times(
    policy: Policy, *, context_length: int, num_sequences: int, repeats: int
) -> DecodeTimes:
    """Time passes of the full model and without all attentions, all MLPs, all layers.

    One layer of thirty is a few hundredths of a pass, less than a busy machine's noise; all of them
    together are not, and layers have the same shape. Every stage times its own layers on hidden
    states of its own, so no stage waits for another. Every process calls it; all get the same.

    Args:
        policy: Its weights matter only as far as they are there.
        context_length: Positions that every sequence attends to.
        num_sequences: Sequences that are decoded together.
        repeats: Rounds; the median of each case counts.
    """
    stage = _StagePass(policy, context_length, num_sequences)
    num_layers = policy.architecture.num_layers
    plans = [
        LayerSkipPlan.full(num_layers),
        LayerSkipPlan(num_layers, frozenset((i, "attention") for i in range(num_layers))),
        LayerSkipPlan(num_layers, frozenset((i, "mlp") for i in range(num_layers))),
        LayerSkipPlan(num_layers, frozenset((i, "layer") for i in range(num_layers))),
    ]
    for plan in plans:
        stage.seconds(plan)
    barrier()
    rounds = [[stage.seconds(plan) for plan in plans] for _ in range(repeats)]
    medians, noise = typical_round(rounds)
    context = policy.context
    everywhere = gather_all((context.pipeline.rank, medians, noise), context)
    per_stage: list[list[float]] = []
    for rank in range(context.pipeline.size):
        peers = [found for stage_rank, found, _ in everywhere if stage_rank == rank]
        per_stage.append([statistics.mean(values) for values in zip(*peers, strict=True)])
    full, no_attention, no_mlp, nothing = (sum(column) for column in zip(*per_stage, strict=True))
    layer = max(full - nothing, _LEAST_SHARE * full) / num_layers
    # What both halves save apart need not add up to what they save together; their shares count.
    attention, mlp = max(full - no_attention, 0.0), max(full - no_mlp, 0.0)
    share = attention / (attention + mlp) if attention + mlp > 0 else 0.5
    share = min(max(share, _LEAST_SHARE), 1.0 - _LEAST_SHARE)
    return DecodeTimes(
        context_length=context_length,
        num_sequences=num_sequences,
        step=full,
        layer=layer,
        attention=layer * share,
        mlp=layer * (1.0 - share),
        head=min(per_stage[-1][3], full - num_layers * layer),
        tensor_model_parallel_size=context.tensor.size,
        noise=max(noise for _, _, noise in everywhere),
    )


def typical_round(rounds: Sequence[Sequence[float]]) -> tuple[list[float], float]:
    """Median seconds of each case, and how little of the layers' time the scatter leaves certain.

    Args:
        rounds: For each round the seconds of its cases, the full model first and that without
            layers last.

    Returns:
        The medians, and the standard error of first minus last as a share of it, 1 at most: from
        median absolute deviations, which one slow round does not move. 1 for fewer than two rounds.
    """
    columns = list(zip(*rounds, strict=True))
    medians = [statistics.median(column) for column in columns]
    layers = medians[0] - medians[-1]
    if len(rounds) < 2 or layers <= 0:
        return medians, 1.0
    squares = [
        statistics.median(abs(value - middle) for value in column) ** 2
        for column, middle in zip(columns, medians, strict=True)
    ]
    # All cases are differences of a kind: the loudest two count.
    loudest = math.sqrt(sum(sorted(squares)[-2:]))
    return medians, min(1.0, _MEDIAN_ERROR * loudest / math.sqrt(len(rounds)) / layers)


class _StagePass:
    """One token for each sequence through this process's layers."""

    def __init__(self, policy: Policy, context_length: int, num_sequences: int) -> None:
        self._decoder = PolicyDecoder(policy)
        decoder, device = self._decoder, self._decoder.device
        full = LayerSkipPlan.full(policy.architecture.num_layers)
        self._cache = decoder.new_cache(full, num_sequences, context_length)
        self._pass = TokenPass(
            slots=torch.arange(num_sequences, device=device),
            positions=torch.full((num_sequences,), context_length - 1, device=device),
            width=1,
            span=context_length,
        )
        self._tokens = torch.arange(num_sequences, device=device) % decoder.vocab_size
        generator = torch.Generator().manual_seed(0)
        hidden = torch.randn(decoder.hidden_shape(num_sequences), generator=generator)
        self._hidden = hidden.to(device=device, dtype=decoder.dtype)
        self._uniforms = torch.full((num_sequences,), 0.5, dtype=torch.float64, device=device)
        self._sampling = SamplingParams(max_new_tokens=1)

    def seconds(self, plan: LayerSkipPlan) -> float:
        """Wall-clock time of one pass, with the draw of a token on the last stage."""
        decoder = self._decoder
        self._wait()
        started = time.perf_counter()
        for chunk in range(decoder.num_chunks):
            takes_tokens = decoder.link.is_first and chunk == 0
            inputs = self._tokens if takes_tokens else self._hidden
            output = decoder.forward(chunk, inputs, self._pass, self._cache, plan)
        if decoder.link.is_last:
            sample_tokens(
                output,
                self._uniforms,
                self._sampling,
                vocab_start=decoder.vocab_start,
                vocab_size=decoder.vocab_size,
                group=decoder.tensor_group,
            )
        self._wait()
        return time.perf_counter() - started

    def _wait(self) -> None:
        if self._decoder.device.type == "cuda":
            torch.cuda.synchronize(self._decoder.device)
