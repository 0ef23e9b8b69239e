"""Weights that change places: all of them, in pieces of any size, and back whatever happens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from nested_reft_mcore.training import reference
from nested_reft_mcore.training.reference import ReferencePolicy


class TwoChunks:
    """A policy of two virtual stages, whose weights arrive when they are asked for."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.chunks = [nn.Linear(3, 5), nn.Linear(2, 4, dtype=torch.bfloat16)]
        self.context = SimpleNamespace(device=torch.device("cpu"))
        self.is_replaced = False
        self.late: float | None = None

    def sync_parameters(self) -> None:
        if self.late is not None:
            for parameter in self.parameters():
                parameter.data.fill_(self.late)
            self.late = None

    def parameters(self) -> list[nn.Parameter]:
        return [parameter for chunk in self.chunks for parameter in chunk.parameters()]

    def weights(self) -> list[Tensor]:
        return [parameter.detach().clone() for parameter in self.parameters()]

    def move(self) -> None:
        for parameter in self.parameters():
            parameter.data += 1.0


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.fixture(params=[1, 4, 2**24])
def policy(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> TwoChunks:
    """Its weights change places so many elements at a time."""
    monkeypatch.setattr(reference, "_PIECE", request.param)
    return TwoChunks()


def test_every_weight_of_every_chunk_changes_places(policy: TwoChunks) -> None:
    made, initial = ReferencePolicy(cast(Any, policy)), policy.weights()
    policy.move()
    moved, addresses = policy.weights(), [p.data_ptr() for p in policy.parameters()]
    for _ in range(2):
        with made.in_place() as found:
            assert found is cast(Any, policy)
            assert policy.is_replaced
            assert same(policy.weights(), initial)
        assert not policy.is_replaced
        assert same(policy.weights(), moved)
    # In place: optimizers and buffers of Megatron's look at the same memory.
    assert [p.data_ptr() for p in policy.parameters()] == addresses


def test_an_exchange_that_fails_half_way_is_undone(
    policy: TwoChunks, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ReferencePolicy(cast(Any, policy))
    policy.move()
    moved, pairs = policy.weights(), list(made._pairs)
    # The last weight's copy is of another size: all others have changed places by then.
    monkeypatch.setattr(made, "_pairs", [*pairs[:-1], (pairs[-1][0], torch.zeros(99))])
    with pytest.raises((ValueError, RuntimeError)), made.in_place():
        pass
    assert same(policy.weights(), moved)
    assert not policy.is_replaced


def test_values_that_arrive_late_go_where_they_belong(policy: TwoChunks) -> None:
    policy.late = 2.0
    made = ReferencePolicy(cast(Any, policy))
    policy.late = 3.0
    with made.in_place():
        assert same(policy.weights(), [torch.full_like(p, 2.0) for p in policy.weights()])
        # A forward pass that began to gather, and got what was there already.
        policy.late = 2.0
    assert policy.late is None
    assert same(policy.weights(), [torch.full_like(p, 3.0) for p in policy.weights()])
