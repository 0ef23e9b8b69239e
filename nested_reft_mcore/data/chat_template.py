"""Chat templates for tokenizers that bring no machinery of their own."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from nested_reft_mcore.config.errors import UserError

if TYPE_CHECKING:
    from jinja2 import Template

Message = Mapping[str, str]
"""One turn of a chat: `role` and `content`."""

_GUARD = "\ufdd0"
"""Not a character: no text has it. It keeps a special token that a user spells from being one."""


def render_pieces(
    template: str, messages: Sequence[Message], special_tokens: Sequence[str], **variables: str
) -> list[str]:
    """The rendered chat, cut at its special tokens, each of which is a piece of its own.

    Runs in Jinja's immutable sandbox with the settings and functions that transformers gives a chat
    template. A special token that a message spells is not one: only the template's own are. Every
    second piece is a special token; the others are text and may be empty.

    Raises:
        UserError: the template is not valid or refuses the messages.
    """
    names = "|".join(re.escape(token) for token in sorted(special_tokens, key=len, reverse=True))
    cut = re.compile(f"({names or '(?!)'})")

    def guarded(text: str) -> str:
        return cut.sub(lambda found: found.group(0)[:1] + _GUARD + found.group(0)[1:], text)

    turns = [{key: guarded(value) for key, value in turn.items()} for turn in messages]
    try:
        rendered = _compile(template).render(
            messages=turns, add_generation_prompt=True, **variables
        )
    except Exception as error:  # a template is a program: it raises what it likes
        roles = [message.get("role") for message in messages]
        raise UserError(f"the chat template refused the messages ({roles}): {error}") from error
    return [piece.replace(_GUARD, "") for piece in cut.split(rendered)]


def check_template(template: str, place: str) -> None:
    """Refuse what is no Jinja template, before any question goes through it.

    Raises:
        UserError: names `place`, the line and what is wrong there.
    """
    from jinja2 import TemplateSyntaxError

    try:
        _compile(template)
    except TemplateSyntaxError as error:
        raise UserError(f"{place}:{error.lineno}: no Jinja template: {error.message}") from error


@lru_cache
def _compile(template: str) -> Template:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = _raise
    return environment.from_string(template)


def _raise(message: str) -> None:
    """What templates call `raise_exception`. Always a ValueError."""
    raise ValueError(message)
