"""A transformer so small that its expected gradients can be summed over every completion.

Causal attention and an mlp in each layer, RMS norms before them, residual stream, float64. A
`LayerSkipPlan` leaves out the same parts that it leaves out of the real models: a skipped part adds
nothing to the residual stream.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.analysis.sequence_space import SequenceSpace

_WIDTH, _HEADS, _MLP_WIDTH = 8, 2, 16
_PART_SCALE = 0.35
"""How much a part adds to the residual stream: makes one layer of eight worth some 0.05 nats."""
_LOGIT_SCALE = 1.5


class ToyLayer(nn.Module):
    """Attention and mlp of one layer, each as what it adds to the residual stream."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        self.qkv = _matrix(3 * _WIDTH, _WIDTH, 1.5, generator)
        self.proj = _matrix(_WIDTH, _WIDTH, _PART_SCALE, generator)
        self.up = _matrix(_MLP_WIDTH, _WIDTH, 1.5, generator)
        self.down = _matrix(_WIDTH, _MLP_WIDTH, _PART_SCALE, generator)

    def attention(self, hidden: Tensor) -> Tensor:
        """`[..., seq, width]` from `[..., seq, width]`; position t looks at 0 .. t."""
        *batch, seq, _ = hidden.shape
        query, key, value = (
            part.reshape(*batch, seq, _HEADS, -1).transpose(-3, -2)
            for part in (_normed(hidden) @ self.qkv.T).chunk(3, dim=-1)
        )
        scores = query @ key.transpose(-2, -1) / math.sqrt(_WIDTH // _HEADS)
        later = torch.ones(seq, seq, dtype=torch.bool).triu(1)
        mixed = scores.masked_fill(later, -torch.inf).softmax(dim=-1) @ value
        return mixed.transpose(-3, -2).reshape(*batch, seq, _WIDTH) @ self.proj.T

    def mlp(self, hidden: Tensor) -> Tensor:
        """`[..., seq, width]` from `[..., seq, width]`, position by position."""
        return torch.tanh(_normed(hidden) @ self.up.T) @ self.down.T


class ToyPolicy(nn.Module):
    """A policy over a `SequenceSpace`; random weights that follow from the seed, float64."""

    def __init__(self, space: SequenceSpace, num_layers: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.space = space
        self.num_layers = num_layers
        # One row more than there are tokens: what the first token is drawn after.
        self.embedding = _matrix(space.vocabulary + 1, _WIDTH, math.sqrt(_WIDTH), generator)
        self.positions = _matrix(space.max_length, _WIDTH, math.sqrt(_WIDTH), generator)
        self.layers = nn.ModuleList(ToyLayer(generator) for _ in range(num_layers))
        self.head = _matrix(space.vocabulary, _WIDTH, _LOGIT_SCALE, generator)

    def forward(self, tokens: Tensor, plan: LayerSkipPlan) -> Tensor:
        """`[..., seq, vocabulary]` next-token log-probs of `[..., seq]` tokens."""
        hidden = self.embedding[tokens] + self.positions[: tokens.shape[-1]]
        for index, layer in enumerate(self.layers):
            assert isinstance(layer, ToyLayer)
            if not plan.skips_attention(index):
                hidden = hidden + layer.attention(hidden)
            if not plan.skips_mlp(index):
                hidden = hidden + layer.mlp(hidden)
        return torch.log_softmax(_normed(hidden) @ self.head.T, dim=-1)

    def table(self, plan: LayerSkipPlan | None = None) -> Tensor:
        """`[prefixes, vocabulary]` log-probs of the policy that skips what `plan` says.

        Raises ValueError for a plan of another number of layers.
        """
        plan = plan or LayerSkipPlan.full(self.num_layers)
        if plan.num_layers != self.num_layers:
            raise ValueError(f"a plan of {plan.num_layers} layers for {self.num_layers} layers")
        every_position = self(self.space.prefix_tokens, plan)
        return every_position[torch.arange(len(every_position)), self.space.prefix_lengths]

    def flat_gradient(self, value: Tensor) -> Tensor:
        """`[parameters]` gradient of a scalar, zeros for what it does not hang on."""
        found = torch.autograd.grad(
            value,
            list(self.parameters()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        return torch.cat([gradient.flatten() for gradient in found])

    def scores(self) -> Tensor:
        """`[prefixes * vocabulary, parameters]`: gradient of every entry of the full policy's
        table, the score functions of all its tokens."""
        plan = LayerSkipPlan.full(self.num_layers)
        rows = []
        for prefix in self.space.prefixes:
            # One prefix at a time: the graph that each gradient walks is that of a few tokens.
            row = self(torch.tensor((self.space.vocabulary, *prefix)), plan)[-1]
            rows += [self.flat_gradient(entry) for entry in row]
        return torch.stack(rows)


def truncated(table: Tensor, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """A table of what is left after top-k, then top-p, renormalised; -inf for what is cut off.

    Top-p keeps the likeliest tokens until their mass reaches `top_p`, at least one.
    """
    if top_k is not None:
        threshold = table.topk(min(top_k, table.shape[1]), dim=1).values[:, -1:]
        table = table.masked_fill(table < threshold, -torch.inf).log_softmax(dim=1)
    if top_p is not None:
        ordered, order = table.exp().sort(dim=1, descending=True)
        before = ordered.cumsum(dim=1) - ordered
        cut = torch.zeros_like(before, dtype=torch.bool).scatter(1, order, before >= top_p)
        table = table.masked_fill(cut, -torch.inf).log_softmax(dim=1)
    return table


def at_temperature(table: Tensor, temperature: float) -> Tensor:
    """The table of the policy sampled at another temperature."""
    return (table / temperature).log_softmax(dim=1)


def _matrix(rows: int, columns: int, scale: float, generator: torch.Generator) -> nn.Parameter:
    """Random entries of variance scale^2 / columns."""
    values = torch.randn(rows, columns, dtype=torch.float64, generator=generator)
    return nn.Parameter(values * scale / math.sqrt(columns))


def _normed(hidden: Tensor) -> Tensor:
    return functional.rms_norm(hidden, (_WIDTH,), eps=1e-6)
