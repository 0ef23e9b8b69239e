"""Decoding on CUDA through one graph for each half of a layer.

Launching a layer's small kernels one by one takes longer than they run. A graph for each half,
rather than one for the model, serves every plan: what is skipped is not replayed.

No device was at hand where this was written: it has been type-checked and read, never run.
"""

from __future__ import annotations

from collections.abc import Callable
from weakref import WeakKeyDictionary, proxy

import torch
from torch import Tensor

from nested_reft_mcore.mcore.decode_torch import Places, TorchMath, TorchPass
from nested_reft_mcore.mcore.kv_cache import KeyValueCache
from nested_reft_mcore.mcore.layer_weights import DecodeShape, LayerWeights, parameters_of
from nested_reft_mcore.rollout.token_pass import TokenPass

SPAN_STEP = 256
"""Graphs look at a multiple of so many places; those beyond a row's own are masked."""


class GraphedMath(TorchMath):
    """Torch's operations, replayed where a pass only decodes one token per row."""

    def __init__(
        self, shape: DecodeShape, sum_over_shards: Callable[[Tensor], None] | None
    ) -> None:
        super().__init__(shape, sum_over_shards)
        self._frames: WeakKeyDictionary[KeyValueCache, dict[tuple[int, int], _Frame]] = (
            WeakKeyDictionary()
        )
        self._addresses: list[int] = []

    def begin(self, weights: list[LayerWeights]) -> None:
        """Forget the graphs where parameters have moved: a graph reads from fixed addresses."""
        addresses = [tensor.data_ptr() for layer in weights for tensor in parameters_of(layer)]
        if addresses != self._addresses:
            self._frames.clear()
        self._addresses = addresses

    def start(
        self,
        hidden: Tensor,
        tokens: TokenPass,
        cache: KeyValueCache,
        rotation: tuple[Tensor, Tensor],
    ) -> TorchPass | _GraphedPass:
        """A pass of `hidden` `[tokens, hidden]`, which is overwritten."""
        rows = tokens.slots.shape[0]
        if tokens.pieces or tokens.copies or tokens.width > 1 or not rows:
            return super().start(hidden, tokens, cache, rotation)
        # Powers of two: few sizes, at most twice the rows.
        extent = (1 << (rows - 1).bit_length(), -(-tokens.span // SPAN_STEP) * SPAN_STEP)
        extent = (extent[0], min(extent[1], cache.length))
        frames = self._frames.setdefault(cache, {})
        if extent not in frames:
            frames[extent] = _Frame(self, extent, cache, hidden)
        return _GraphedPass(frames[extent], hidden, tokens, rotation)


class _Frame:
    """Fixed memory for so many rows and places, and the graphs that work on it."""

    def __init__(
        self, math: TorchMath, extent: tuple[int, int], cache: KeyValueCache, like: Tensor
    ) -> None:
        rows, span = extent
        self.rows = rows
        self.hidden = like.new_zeros(rows, like.shape[1])
        self.slots = torch.zeros(rows, dtype=torch.int64, device=like.device)
        self.positions = torch.zeros_like(self.slots)
        self.mask = torch.zeros(rows, 1, 1, span, dtype=torch.bool, device=like.device)
        self._graphs: dict[tuple[int, str], torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._places = Places(
            slots=self.slots,
            positions=self.positions,
            width=1,
            span=span,
            row_slots=self.slots,
            num_rows=rows,
            mask=self.mask,
            pieces=(),
            copies=(),
        )
        tables = torch.zeros(1, math.shape.head_dim // 2, device=like.device)
        # Frames die with their cache, so they must not keep it alive.
        self.eager = TorchPass(math, self.hidden, self._places, proxy(cache), (tables, tables))

    def fill(self, hidden: Tensor, tokens: TokenPass, rotation: tuple[Tensor, Tensor]) -> None:
        """Put a pass into the fixed memory; surplus rows repeat the first one."""
        count = hidden.shape[0]
        for fixed, now in (
            (self.hidden, hidden),
            (self.slots, tokens.slots),
            (self.positions, tokens.positions),
        ):
            fixed[:count] = now
            fixed[count:] = now[0]
        places = torch.arange(self.mask.shape[-1], device=hidden.device)
        self.mask.copy_((places <= self.positions[:, None])[:, None, None])
        self.eager.turn(self.positions, rotation)

    def run(self, layer: LayerWeights, half: str) -> None:
        """Half a layer: the first time as it is, which warms up; then captured; then replayed."""
        step = self.eager.attention if half == "attention" else self.eager.mlp
        key = (layer.index, half)
        if key not in self._graphs:
            self._graphs[key] = None
            step(layer)
            return
        graph = self._graphs[key]
        if graph is None:
            graph = self._graphs[key] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                step(layer)
        graph.replay()


class _GraphedPass:
    """Hidden states on their way through the layers of one chunk."""

    def __init__(
        self, frame: _Frame, hidden: Tensor, tokens: TokenPass, rotation: tuple[Tensor, Tensor]
    ) -> None:
        self._frame = frame
        self._count = hidden.shape[0]
        frame.fill(hidden, tokens, rotation)

    @property
    def hidden(self) -> Tensor:
        """`[tokens, hidden]`, a copy: the next pass overwrites the fixed memory."""
        return self._frame.hidden[: self._count].clone()

    def keep_rows(self) -> None:
        """There are rows alone."""

    def attention(self, layer: LayerWeights) -> None:
        """Add what attention adds to the residual stream."""
        self._frame.run(layer, "attention")

    def mlp(self, layer: LayerWeights) -> None:
        """Add what the MLP adds to the residual stream."""
        self._frame.run(layer, "mlp")
