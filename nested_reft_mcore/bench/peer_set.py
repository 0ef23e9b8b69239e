"""The peers of a run, which live on the first process only; all processes hear how they did."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack

from nested_reft_mcore.bench.peers import Peer, PeerUnavailable
from nested_reft_mcore.config.bench import PeerName
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.agreement import on_main


class PeerSet:
    """Peers that were started, and why the others were not. All processes make the same calls.

    A context manager that ends the peers.
    """

    def __init__(self, context: ParallelContext) -> None:
        self._context = context
        self._peers: dict[PeerName, Peer] = {}
        self._stack = ExitStack()
        self.versions: dict[PeerName, str] = {}
        """Of those that were started."""
        self.reasons: dict[PeerName, str] = {}
        """Why a peer is not measured, or not any more."""

    @property
    def names(self) -> list[PeerName]:
        """Peers that can be asked."""
        return [name for name in self.versions if name not in self.reasons]

    def start(self, name: PeerName, make: Callable[[], Peer]) -> None:
        """Start one with `make`, on the first process; it may fail with a reason."""

        def start() -> tuple[str | None, str | None]:
            try:
                peer = make()
            except PeerUnavailable as error:
                return None, str(error)
            self._peers[name] = peer
            self._stack.callback(peer.close)
            return peer.version, None

        version, reason = on_main(start, self._context)
        if version is not None:
            self.versions[name] = version
        if reason is not None:
            self.reasons[name] = reason

    def generate(
        self, name: PeerName, prompts: Sequence[Sequence[int]], new_tokens: int
    ) -> float | None:
        """Seconds of one generation, on every process; None once the peer has failed."""
        if name in self.reasons:
            return None

        def generate() -> tuple[float | None, str | None]:
            try:
                return self._peers[name].generate(prompts, new_tokens), None
            except PeerUnavailable as error:
                return None, str(error)

        seconds, reason = on_main(generate, self._context)
        if reason is not None:
            self.reasons[name] = reason
        return seconds

    def __enter__(self) -> PeerSet:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
