"""Scores from hidden states: exact gradients, no whole logits, types, and what is left out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nested_reft_mcore.launch.context import ParallelDimension
from nested_reft_mcore.mcore.logprobs import token_logprobs

ALONE = ParallelDimension(0, 1, (0,))
SEQ, BATCH, HIDDEN, VOCAB = 6, 4, 5, 40


def drawn(dtype: torch.dtype, rows: int = VOCAB + 3) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, a matrix with rows of padding, and labels."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(SEQ, BATCH, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(rows, HIDDEN, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(0, VOCAB, (BATCH, SEQ), generator=generator)


def scores(
    hidden: Tensor, weight: Tensor, labels: Tensor, mask: Tensor | None = None, **options: Any
) -> tuple[Tensor, Tensor]:
    settings = {"temperature": 0.8, "vocab_size": VOCAB, "chunk_tokens": 5, **options}
    return token_logprobs(hidden, weight, labels, mask, tensor=ALONE, **settings)


@pytest.mark.parametrize("is_masked", [False, True])
def test_gradients_are_exact(is_masked: bool) -> None:
    hidden, weight, labels = drawn(torch.float64)
    hidden, weight = (part.detach().requires_grad_() for part in (hidden[:3, :2], weight[:9]))
    mask = torch.tensor([[True, False, True], [True, True, False]]) if is_masked else None
    labels = labels[:2, :3] % 8

    def both(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return scores(hidden, weight, labels, mask, vocab_size=8, chunk_tokens=4)

    # Both scores, and each alone: a gradient that is not asked for takes another path.
    assert torch.autograd.gradcheck(both, (hidden, weight))
    assert torch.autograd.gradcheck(lambda *given: both(*given)[0], (hidden, weight))
    assert torch.autograd.gradcheck(lambda *given: both(*given)[1], (hidden, weight))


def test_only_what_is_asked_has_a_gradient() -> None:
    hidden, weight, labels = drawn(torch.float64)
    hidden.requires_grad_(False)
    scores(hidden, weight, labels)[0].sum().backward()
    assert hidden.grad is None
    assert weight.grad is not None
    expected = weight.grad.clone()
    hidden, weight, labels = drawn(torch.float64)
    weight.requires_grad_(False)
    scores(hidden, weight, labels)[0].sum().backward()
    assert weight.grad is None
    assert hidden.grad is not None
    hidden, weight, labels = drawn(torch.float64)
    scores(hidden, weight, labels)[0].sum().backward()
    assert torch.equal(expected, weight.grad)


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation gave while this lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0) if sizes else self.elements
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_never_whole(dtype: torch.dtype) -> None:
    hidden, weight, labels = drawn(dtype)
    with LargestTensor() as largest:
        logprobs, entropies = scores(hidden, weight, labels)
        (logprobs.sum() + entropies.sum()).backward()
    # A chunk of five positions, or the matrix's gradient.
    assert largest.elements == max(5 * VOCAB, weight.numel())
    assert largest.elements < SEQ * BATCH * VOCAB
    with LargestTensor() as largest:
        (hidden @ weight.t()).float().log_softmax(-1)
    assert largest.elements == SEQ * BATCH * weight.shape[0]


def test_bfloat16_weights_have_float32_scores() -> None:
    hidden, weight, labels = drawn(torch.bfloat16)
    logprobs, entropies = scores(hidden, weight, labels)
    assert logprobs.dtype == entropies.dtype == torch.float32
    # As the rollout engine does: logits in bfloat16, everything after them in float32.
    logits = (hidden @ weight[:VOCAB].t()).float().transpose(0, 1) / 0.8
    expected = logits.log_softmax(-1)
    found = expected.gather(-1, labels[..., None])[..., 0]
    torch.testing.assert_close(logprobs, found, rtol=1e-5, atol=1e-5)
    (logprobs + entropies).sum().backward()
    for given in (hidden, weight):
        assert given.grad is not None
        assert given.grad.dtype == torch.bfloat16
    exact_hidden, exact_weight, _ = drawn(torch.bfloat16)
    exact = [exact_hidden.detach().double(), exact_weight.detach().double()]
    for values in exact:
        values.requires_grad_()
    sum(values.sum() for values in scores(*exact, labels)).backward()
    for given, values in zip((hidden, weight), exact, strict=True):
        assert given.grad is not None
        assert values.grad is not None
        error = (given.grad.double() - values.grad).abs().max() / values.grad.abs().max()
        assert error < 2e-2


def test_many_chunks_add_up_in_float32() -> None:
    """In bfloat16 one chunk after the other, sums of many small terms would stand still."""
    hidden = torch.ones(2000, 1, 1, dtype=torch.bfloat16)
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(1, 2000, dtype=torch.int64)
    logprobs, _ = scores(hidden, weight, labels, vocab_size=2, temperature=1.0, chunk_tokens=1)
    logprobs.sum().backward()
    assert weight.grad is not None
    assert weight.grad[:, 0].tolist() == [1000.0, -1000.0]


def test_extreme_logits() -> None:
    """Masses that underflow, and logits far beyond what exp can take."""
    hidden = torch.tensor([[[1.0]], [[-1.0]]]).requires_grad_()
    weight = torch.tensor([[3e4], [-3e4], [3e4]]).requires_grad_()
    labels = torch.tensor([[0, 0]])
    logprobs, entropies = scores(hidden, weight, labels, vocab_size=3, temperature=1.0)
    assert logprobs[0].tolist() == pytest.approx([-0.693147, -6e4])
    assert entropies[0].tolist() == pytest.approx([0.693147, 0.0])
    (logprobs + entropies).sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_what_is_broken_and_not_asked_poisons_nothing() -> None:
    hidden, weight, labels = drawn(torch.float32)
    scores(hidden[:3], weight, labels[:, :3])[0].sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    expected = hidden.grad.clone(), weight.grad.clone()
    broken = hidden.detach().clone()
    broken[3:] = torch.nan
    broken.requires_grad_()
    weight.grad = None
    logprobs, entropies = scores(broken, weight, labels)
    assert logprobs[:, 3:].isnan().all()
    (logprobs[:, :3].sum() + 0 * entropies[:, :3].sum()).backward()
    assert broken.grad is not None
    torch.testing.assert_close(broken.grad, expected[0])
    torch.testing.assert_close(weight.grad, expected[1])
