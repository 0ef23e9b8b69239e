"""One response in the making, and what ends it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nested_reft_mcore.rollout.sampling import NO_TOKEN
from nested_reft_mcore.rollout.types import FinishReason, Prompt, SamplingParams

Detokenize = Callable[[tuple[int, ...]], str]


class StopRule:
    """Which token is a response's last.

    Every pipeline stage applies it to the same tokens, so all agree without a word.
    """

    def __init__(self, sampling: SamplingParams, detokenize: Detokenize | None) -> None:
        """Raises ValueError for stop strings without a way to turn tokens into text."""
        if sampling.stop_strings and detokenize is None:
            raise ValueError("stop strings need `detokenize`")
        self.max_new_tokens = sampling.max_new_tokens
        self._token_ids = frozenset(sampling.stop_token_ids)
        self._strings = sampling.stop_strings
        self._detokenize = detokenize
        # A token has at least one byte. A few more, for a decoder may trim where a text begins.
        longest = max((len(text.encode()) for text in sampling.stop_strings), default=0)
        self._tail = longest + 8

    def limit(self, prompt: Prompt) -> int:
        """Longest response to this prompt."""
        own = prompt.max_new_tokens
        return self.max_new_tokens if own is None else min(self.max_new_tokens, own)

    def ends(self, token_ids: list[int]) -> bool:
        """Whether the last of these tokens is a stop token or completes a stop string."""
        if token_ids[-1] in self._token_ids:
            return True
        if not self._strings or self._detokenize is None:
            return False
        tail = self._detokenize(tuple(token_ids[-self._tail :]))
        return any(text in tail for text in self._strings)


@dataclass
class Completion:
    """One response in the making."""

    sequence: int
    """Its number among all that were asked for."""
    prompt: int
    """Place of its prompt among all."""
    sample: int
    """Place in the prompt's group."""
    limit: int
    """Tokens after which it ends."""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    """Absent while it grows."""
    first_token_at: float = 0.0
    """Seconds on whichever clock the caller of `append` uses."""
    finished_at: float = 0.0

    def append(self, token: int, rule: StopRule, now: float) -> None:
        """Take the next token; NO_TOKEN where the logits were no distribution."""
        assert self.finish_reason is None, "a finished response got another token"
        if not self.token_ids:
            self.first_token_at = now
        if token == NO_TOKEN:
            self.finish_reason = "nan"
        else:
            self.token_ids.append(token)
            if rule.ends(self.token_ids):
                self.finish_reason = "stop"
            elif len(self.token_ids) == self.limit:
                self.finish_reason = "length"
        self.finished_at = now
