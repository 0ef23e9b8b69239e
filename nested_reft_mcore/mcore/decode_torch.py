"""A pass by torch's own operations: any device and dtype."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from nested_reft_mcore.mcore.kv_cache import KeyValueCache
from nested_reft_mcore.mcore.layer_weights import DecodeShape, LayerWeights
from nested_reft_mcore.rollout.token_pass import PrefixCopy, PromptPiece, TokenPass


class TorchMath:
    """Layers over hidden states `[tokens, hidden]`."""

    def __init__(
        self, shape: DecodeShape, sum_over_shards: Callable[[Tensor], None] | None
    ) -> None:
        """`sum_over_shards` adds up what tensor-parallel ranks found, in place."""
        self.shape = shape
        self.sum_over_shards = sum_over_shards

    def begin(self, weights: list[LayerWeights]) -> None:
        """Nothing to note: every pass is handed its weights."""

    def start(
        self,
        hidden: Tensor,
        tokens: TokenPass,
        cache: KeyValueCache,
        rotation: tuple[Tensor, Tensor],
    ) -> TorchPass:
        """A pass of `hidden` `[tokens, hidden]`, which is overwritten."""
        return TorchPass(self, hidden, places_of(tokens, cache), cache, rotation)

    def logits(self, hidden: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        """`[tokens, vocab_local]` in float32 of hidden states `[tokens, hidden]`."""
        return F.linear(self.norm(hidden, norm), weight).float()

    def norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """Root mean square norm over the last dimension."""
        return F.rms_norm(hidden, (hidden.shape[-1],), weight, self.shape.epsilon)


@dataclass(frozen=True)
class Places:
    """Where the tokens of a pass stand in the cache, and what they look at."""

    slots: Tensor
    """`[tokens]`."""
    positions: Tensor
    """`[tokens]`."""
    width: int
    """Tokens of each row."""
    span: int
    """Places that rows look at."""
    row_slots: Tensor | slice
    """Slots of the rows; a slice where they follow one another."""
    num_rows: int
    mask: Tensor | None
    """`[rows, 1, width, span]`, true where attended; absent where all are."""
    pieces: tuple[PieceBatch, ...]
    copies: tuple[tuple[int, Tensor, int], ...]
    """Source slot, target slots, positions."""


@dataclass(frozen=True)
class PieceBatch:
    """Pieces of equal length at an equal place, which attend in one call."""

    tokens: Tensor
    """`[pieces, length]`: places of their tokens in the pass."""
    slots: Tensor
    """`[pieces]`."""
    end: int
    """Position after their last token."""
    mask: Tensor | None
    """`[length, end]`, true where attended; absent where the pieces start at 0: plainly causal."""


class TorchPass:
    """Hidden states on their way through the layers of one chunk."""

    def __init__(
        self,
        math: TorchMath,
        hidden: Tensor,
        places: Places,
        cache: KeyValueCache,
        rotation: tuple[Tensor, Tensor],
    ) -> None:
        self.hidden = hidden
        self._math = math
        self._places = places
        self._cache = cache
        extents = (hidden.shape[0], 1, math.shape.head_dim)
        self._cosine, self._sine = hidden.new_empty(extents), hidden.new_empty(extents)
        self.turn(places.positions, rotation)
        self._num_queries = hidden.shape[0]

    def turn(self, positions: Tensor, rotation: tuple[Tensor, Tensor]) -> None:
        """Take the rotary angles of `positions` `[tokens]` from the tables.

        Megatron rotates halves: (x1, x2) becomes (x1 cos - x2 sin, x2 cos + x1 sin).
        """
        cosine, sine = (table[positions] for table in rotation)
        self._cosine[:, 0] = torch.cat([cosine, cosine], dim=-1)
        self._sine[:, 0] = torch.cat([-sine, sine], dim=-1)

    def keep_rows(self) -> None:
        """Only the rows' tokens go on: pieces write their keys and values, no more."""
        self._num_queries = self._places.num_rows * self._places.width

    def attention(self, layer: LayerWeights) -> None:
        """Add what attention adds to the residual stream."""
        math, shape, places = self._math, self._math.shape, self._places
        keys, values = self._cache.keys[layer.index], self._cache.values[layer.index]
        mixed = F.linear(math.norm(self.hidden, layer.attention_norm), layer.qkv, layer.qkv_bias)
        mixed = mixed.view(-1, shape.groups, shape.heads_per_group + 2, shape.head_dim)
        query, key, value = mixed.split((shape.heads_per_group, 1, 1), dim=2)
        query = query[: self._num_queries].flatten(1, 2)
        key = key.squeeze(2)
        if layer.query_norm is not None:
            query = math.norm(query, layer.query_norm)
        if layer.key_norm is not None:
            key = math.norm(key, layer.key_norm)
        keys[places.slots, :, places.positions] = self._rotate(key)
        values[places.slots, :, places.positions] = value.squeeze(2)
        for source, targets, length in places.copies:
            keys[targets, :, :length] = keys[source, :, :length]
            values[targets, :, :length] = values[source, :, :length]
        context = self._attend(self._rotate(query), keys, values)
        self._add(F.linear(context, layer.projection))

    def mlp(self, layer: LayerWeights) -> None:
        """Add what the SwiGLU MLP adds to the residual stream."""
        normed = self._math.norm(self.hidden[: self._num_queries], layer.mlp_norm)
        gate, up = F.linear(normed, layer.gate_and_up).chunk(2, dim=-1)
        self._add(F.linear(F.silu(gate) * up, layer.down))

    def _add(self, partial: Tensor) -> None:
        if self._math.sum_over_shards is not None:
            self._math.sum_over_shards(partial)
        self.hidden[: self._num_queries] += partial

    def _rotate(self, heads: Tensor) -> Tensor:
        """Rotary embedding of `[tokens, heads, head_dim]`."""
        count, half = heads.shape[0], heads.shape[-1] // 2
        return heads * self._cosine[:count] + heads.roll(half, dims=-1) * self._sine[:count]

    def _attend(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Rows, then pieces: `[tokens, heads, head_dim]` to `[tokens, heads * head_dim]`."""
        num_row_tokens = self._places.num_rows * self._places.width
        if num_row_tokens == query.shape[0]:
            return self._attend_rows(query, keys, values)
        context = torch.empty_like(query)
        context[:num_row_tokens] = self._attend_rows(query[:num_row_tokens], keys, values).view(
            -1, *query.shape[1:]
        )
        for batch in self._places.pieces:
            context[batch.tokens] = F.scaled_dot_product_attention(
                query[batch.tokens].transpose(1, 2),
                keys[batch.slots, :, : batch.end],
                values[batch.slots, :, : batch.end],
                attn_mask=batch.mask,
                is_causal=batch.mask is None,
                enable_gqa=self._math.shape.heads_per_group > 1,
            ).transpose(1, 2)
        return context.flatten(1)

    def _attend_rows(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The heads of a group share keys: as queries of one attention nothing is repeated."""
        shape, places = self._math.shape, self._places
        if not places.num_rows:
            return query.flatten(1)
        heads = (places.num_rows, places.width, shape.groups, shape.heads_per_group)
        folded = query.view(*heads, shape.head_dim).permute(0, 2, 3, 1, 4).flatten(2, 3)
        mask = places.mask
        if mask is not None and places.width > 1:
            mask = mask.repeat(1, 1, shape.heads_per_group, 1)
        context = F.scaled_dot_product_attention(
            folded,
            keys[places.row_slots, :, : places.span],
            values[places.row_slots, :, : places.span],
            attn_mask=mask,
        )
        context = context.unflatten(2, (shape.heads_per_group, places.width))
        return context.permute(0, 3, 1, 2, 4).reshape(query.shape[0], -1)


def places_of(tokens: TokenPass, cache: KeyValueCache) -> Places:
    """Where a pass's tokens stand.

    Raises ValueError for a span beyond the cache.
    """
    ends = [tokens.span, *(piece.start + piece.length for piece in tokens.pieces)]
    if max(ends) > cache.length:
        raise ValueError(
            f"the pass goes to position {max(ends)}, the cache has {cache.length} for each slot"
        )
    device, offsets = tokens.slots.device, torch.arange(tokens.width, device=tokens.slots.device)
    positions = tokens.positions[:, None] + offsets
    slots = tokens.slots[:, None].expand_as(positions)
    placed_slots, placed_positions = [slots.flatten()], [positions.flatten()]
    for piece in tokens.pieces:
        run = torch.arange(piece.start, piece.start + piece.length, device=device)
        placed_slots.append(torch.full_like(run, piece.slot))
        placed_positions.append(run)
    return Places(
        slots=torch.cat(placed_slots),
        positions=torch.cat(placed_positions),
        width=tokens.width,
        span=tokens.span,
        row_slots=_consecutive(tokens.slots),
        num_rows=tokens.slots.shape[0],
        mask=_row_mask(positions, tokens.span),
        pieces=_batches(tokens.pieces, tokens.num_row_tokens, device),
        copies=tuple(_copy(copy, device) for copy in tokens.copies),
    )


def _copy(copy: PrefixCopy, device: torch.device) -> tuple[int, Tensor, int]:
    return copy.source, torch.tensor(copy.targets, dtype=torch.int64, device=device), copy.length


def _consecutive(slots: Tensor) -> Tensor | slice:
    """A slice where that is what these slots are; a device is not asked, since it would wait."""
    if slots.device.type != "cpu" or not slots.numel():
        return slots
    first, count = int(slots[0]), slots.shape[0]
    follows = torch.equal(slots, torch.arange(first, first + count))
    return slice(first, first + count) if follows else slots


def _row_mask(positions: Tensor, span: int) -> Tensor | None:
    """`[rows, 1, width, span]`; None where it is known that all places are attended."""
    if positions.device.type == "cpu" and bool((positions == span - 1).all()):
        return None
    return (torch.arange(span, device=positions.device) <= positions[..., None])[:, None]


def _batches(
    pieces: tuple[PromptPiece, ...], first: int, device: torch.device
) -> tuple[PieceBatch, ...]:
    """Pieces by place and length; `first` is the place of their first token in the pass."""
    alike: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for piece in pieces:
        alike.setdefault((piece.start, piece.length), []).append((first, piece.slot))
        first += piece.length
    batches = []
    for (start, length), members in alike.items():
        offsets = torch.arange(length, device=device)
        firsts, slots = torch.tensor(members, device=device).unbind(1)
        mask = None
        if start:
            mask = torch.arange(start + length, device=device) <= start + offsets[:, None]
        batches.append(PieceBatch(firsts[:, None] + offsets, slots, start + length, mask))
    return tuple(batches)
