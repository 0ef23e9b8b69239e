"""A pass by the native kernels: float32 on x86 CPUs, two calls for each layer.

What a token gets is the same to the last bit whoever shares its pass: every sum has an order of
its own.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from nested_reft_mcore.mcore import native
from nested_reft_mcore.mcore.kv_cache import KeyValueCache
from nested_reft_mcore.mcore.layer_weights import DecodeShape, LayerWeights
from nested_reft_mcore.rollout.token_pass import TokenPass

QUERIES_OF_A_RUN = 16
"""Queries of a run of prompt tokens and one group that go through the keys together, about."""

_NO_COPIES = torch.empty(0, 3, dtype=torch.int64)


class NativeMath:
    """Layers over hidden states `[tokens, hidden]`, by the kernels."""

    def __init__(
        self, shape: DecodeShape, sum_over_shards: Callable[[Tensor], None] | None
    ) -> None:
        """`sum_over_shards` adds up what tensor-parallel ranks found, in place.

        Raises native.Unavailable where there are no kernels.
        """
        self.shape = shape
        self.sum_over_shards = sum_over_shards
        self.kernels = native.load_kernels()
        self._records: dict[int, native.Layer] = {}
        self._room: dict[str, Tensor] = {}

    def begin(self, weights: list[LayerWeights]) -> None:
        """Note where the layers' parameters lie now."""
        self._records = {layer.index: _record(layer) for layer in weights}

    def start(
        self,
        hidden: Tensor,
        tokens: TokenPass,
        cache: KeyValueCache,
        rotation: tuple[Tensor, Tensor],
    ) -> NativePass:
        """A pass of `hidden` `[tokens, hidden]` float32, which is overwritten."""
        return NativePass(self, hidden, tokens, cache, rotation)

    def logits(self, hidden: Tensor, norm: Tensor, weight: Tensor) -> Tensor:
        """`[tokens, vocab_local]` of hidden states `[tokens, hidden]`."""
        shape = self.shape
        output = torch.empty(hidden.shape[0], weight.shape[0])
        columns = self.room("columns", native.MAX_BLOCK * shape.hidden_size)
        self.kernels.decode_linear(
            *(hidden.data_ptr(), _contiguous(norm), _contiguous(weight), output.data_ptr()),
            *(columns, hidden.shape[0], shape.hidden_size, weight.shape[0]),
            *(shape.epsilon, torch.get_num_threads()),
        )
        return output

    def record(self, index: int) -> native.Layer:
        """Addresses of a layer's parameters."""
        return self._records[index]

    def room(self, name: str, numbers: int) -> int:
        """Address of scratch memory that is kept from pass to pass."""
        if name not in self._room or self._room[name].numel() < numbers:
            self._room[name] = torch.empty(numbers)
        return self._room[name].data_ptr()


class NativePass:
    """Hidden states on their way through the layers of one chunk."""

    def __init__(
        self,
        math: NativeMath,
        hidden: Tensor,
        tokens: TokenPass,
        cache: KeyValueCache,
        rotation: tuple[Tensor, Tensor],
    ) -> None:
        self.hidden = hidden
        self._math = math
        self._cache = cache
        self._partial = hidden if math.sum_over_shards is None else torch.empty_like(hidden)
        self._num_rows = tokens.slots.shape[0]
        self._num_row_tokens = tokens.num_row_tokens
        # Kept, because the record below holds addresses only.
        self._runs = _runs(tokens, max(1, QUERIES_OF_A_RUN // math.shape.heads_per_group))
        self._copies = _copies(tokens)
        self._rotation = rotation
        self._call = self._describe()
        self._call_address = ctypes.addressof(self._call)
        if not math.kernels.decode_fits(self._call_address, cache.num_slots):
            raise ValueError(
                f"the pass goes to places that the cache has not: it has {cache.num_slots} slots "
                f"of {cache.length} positions"
            )

    def _describe(self) -> native.Pass:
        shape, math, count = self._math.shape, self._math, self.hidden.shape[0]
        width = shape.groups * shape.heads_per_group * shape.head_dim
        widest = max(shape.hidden_size, width)
        return native.Pass(
            hidden_size=shape.hidden_size,
            groups=shape.groups,
            heads_per_group=shape.heads_per_group,
            head_dim=shape.head_dim,
            ffn_size=shape.ffn_size,
            threads=torch.get_num_threads(),
            num_tokens=count,
            num_runs=self._runs.shape[0],
            num_queries=count,
            num_query_runs=self._runs.shape[0],
            num_copies=self._copies.shape[0],
            length=self._cache.length,
            accumulate=self._partial is self.hidden,
            runs=self._runs.data_ptr(),
            copies=self._copies.data_ptr(),
            cosine=self._rotation[0].data_ptr(),
            sine=self._rotation[1].data_ptr(),
            hidden=self.hidden.data_ptr(),
            output=self._partial.data_ptr(),
            qkv=math.room("qkv", count * (width + 2 * shape.groups * shape.head_dim)),
            context=math.room("context", count * width),
            columns=math.room("columns", native.MAX_BLOCK * widest),
            activations=math.room("activations", native.MAX_BLOCK * shape.ffn_size),
            epsilon=shape.epsilon,
        )

    def keep_rows(self) -> None:
        """Only the rows' tokens go on: pieces write their keys and values, no more."""
        self._call.num_queries = self._num_row_tokens
        self._call.num_query_runs = self._num_rows

    def attention(self, layer: LayerWeights) -> None:
        """Add what attention adds to the residual stream."""
        keys, values = self._cache.keys[layer.index], self._cache.values[layer.index]
        self._math.kernels.decode_attention(
            ctypes.addressof(self._math.record(layer.index)),
            *(self._call_address, keys.data_ptr(), values.data_ptr()),
        )
        self._add_shards()

    def mlp(self, layer: LayerWeights) -> None:
        """Add what the MLP adds to the residual stream."""
        record = ctypes.addressof(self._math.record(layer.index))
        self._math.kernels.decode_mlp(record, self._call_address)
        self._add_shards()

    def _add_shards(self) -> None:
        if self._math.sum_over_shards is not None:
            partial = self._partial[: self._call.num_queries]
            self._math.sum_over_shards(partial)
            self.hidden[: self._call.num_queries] += partial


def _runs(tokens: TokenPass, longest: int) -> Tensor:
    """Rows, then pieces cut into short runs: `[runs, 4]` first token, tokens, slot, position."""
    rows = tokens.slots.shape[0]
    firsts = torch.arange(0, rows * tokens.width, tokens.width)
    counts = torch.full((rows,), tokens.width)
    runs = torch.stack((firsts, counts, tokens.slots, tokens.positions), dim=1)
    cut: list[tuple[int, int, int, int]] = []
    first = tokens.num_row_tokens
    for piece in tokens.pieces:
        for start in range(0, piece.length, longest):
            count = min(longest, piece.length - start)
            cut.append((first + start, count, piece.slot, piece.start + start))
        first += piece.length
    return torch.cat([runs, torch.tensor(cut, dtype=torch.int64)]) if cut else runs


def _copies(tokens: TokenPass) -> Tensor:
    """`[copies, 3]` source slot, target slot, positions."""
    if not tokens.copies:
        return _NO_COPIES
    copies = [
        (copy.source, target, copy.length) for copy in tokens.copies for target in copy.targets
    ]
    return torch.tensor(copies, dtype=torch.int64).view(-1, 3)


def _contiguous(weight: Tensor) -> int:
    """The address of a tensor that the kernels can read: whole rows, one after the other."""
    if weight.dtype != torch.float32 or not weight.is_contiguous():
        raise ValueError(
            f"the kernels read contiguous float32, found {weight.dtype} with strides "
            f"{weight.stride()}"
        )
    return weight.data_ptr()


def _record(layer: LayerWeights) -> native.Layer:
    names = [field[0] for field in native.Layer._fields_]
    weights = {name: getattr(layer, name) for name in names}
    return native.Layer(**{n: None if w is None else _contiguous(w) for n, w in weights.items()})
