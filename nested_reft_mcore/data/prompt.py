"""One prompt, ready for the policy."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Prompt:
    """A question with its expected answer."""

    token_ids: tuple[int, ...]
    """What the policy reads, chat template included."""
    text: str
    """The same, as text."""
    answer: str | None = None
    """What the reward compares with; absent where nothing is judged."""
    source: str = ""
    """Where it came from, as `file:line`."""
    max_new_tokens: int | None = None
    """Longest response to this prompt, where it is shorter than everybody's."""
    dataset: str = ""
    """Name of the data set, for figures of each."""
    labels: tuple[tuple[str, str], ...] = ()
    """`(name, value)` pairs that evaluation breaks its figures down by: level, subject."""
    question: str = ""
    """The question alone: no template, suffix or examples."""
