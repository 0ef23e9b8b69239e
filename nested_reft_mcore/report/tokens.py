"""Cut a completion into the tokens that it was made of, without its tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

_REACH = 64
"""Characters that tokens without a text of their own may make together."""
_UNKNOWN = "\ufffd"


def token_lengths(
    text: str, token_ids: Sequence[int], vocabulary: Sequence[str]
) -> list[int] | None:
    """How many UTF-16 units of `text` each token wrote; None where text and tokens don't agree.

    `vocabulary` has the text of each token by itself, which may lack a leading space that it has
    within a text. Tokens that hold a part of a character (byte fallback) have no text: the last of
    them gets the character, the others 0, as special tokens do.
    """
    lengths = [0] * len(token_ids)
    place, open_token = 0, None
    for index, token_id in enumerate(token_ids):
        piece = vocabulary[token_id] if 0 <= token_id < len(vocabulary) else ""
        if not piece:
            continue
        end = None if _UNKNOWN in piece else _end_of(piece, text, place, open_token is not None)
        if end is None:
            open_token = index
            continue
        if open_token is not None:
            start = end - len(piece)
            lengths[open_token] = utf16_length(text[place:start])
            place, open_token = start, None
        lengths[index] = utf16_length(text[place:end])
        place = end
    rest = utf16_length(text[place:])
    if rest and open_token is None:
        return None
    if open_token is not None:
        lengths[open_token] = rest
    return lengths


def utf16_length(text: str) -> int:
    """Units that a browser counts."""
    return len(text) + sum(ord(character) > 0xFFFF for character in text)


def _end_of(piece: str, text: str, place: int, may_skip: bool) -> int | None:
    """Where the piece ends if it stands at `place`, after a space, or soon after open tokens."""
    if may_skip:
        # Open tokens have made a character at least.
        found = text.find(piece, place + 1, place + _REACH + len(piece))
        return None if found < 0 else found + len(piece)
    if text.startswith(piece, place):
        return place + len(piece)
    if text.startswith(" " + piece, place):
        return place + 1 + len(piece)
    return None
