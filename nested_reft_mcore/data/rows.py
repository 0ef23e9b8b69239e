"""What a row of a data set means: the fields that its preset or the configuration names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from nested_reft_mcore.config.data import DataConfig, DataSource, FieldMapping
from nested_reft_mcore.data.layouts import (
    EXPECTED,
    NUMERIC,
    is_number,
    presets_that_fit,
)
from nested_reft_mcore.data.presets import PRESETS, Extract, labels_of
from nested_reft_mcore.data.records import BrokenRow, MissingField, Record, shown


class RowReader:
    """Question, answer, worked answer and labels of the rows of one source.

    A key that the source itself names wins over its preset, and that over the configuration's.
    """

    def __init__(self, source: DataSource, config: DataConfig) -> None:
        fields = source.fields
        preset = None if source.preset is None else PRESETS[source.preset]
        question = _chosen("prompt", fields.prompt, preset and preset.question, config.prompt_field)
        answer = _chosen(
            "answer",
            fields.answer,
            preset and preset.answer,
            config.answer_field,
            Record.number_or_text,
        )
        demonstration = _chosen(
            "demonstration",
            fields.demonstration,
            preset and preset.demonstration,
            config.demonstration_field,
        )
        # Whose fields the source names itself is not that set any more.
        if source.preset is not None and fields == FieldMapping():
            question = _of_this_set(source.preset, question)
            if source.preset in NUMERIC:
                answer = _number_of(source.preset, answer)
        self.question: Extract = question
        """The question alone. BrokenRow where the row has none."""
        self.answer: Extract = answer
        """The expected answer. BrokenRow where the row has none."""
        self.demonstration: Extract = demonstration
        """The worked answer. BrokenRow where the row has none."""
        named = {"level": fields.level, "subject": fields.subject}
        self._labels: Mapping[str, tuple[str, ...]] = {
            **(preset.labels if preset is not None else {}),
            **{name: (key,) for name, key in named.items() if key is not None},
        }

    def labels(self, record: Record) -> tuple[tuple[str, str], ...]:
        """Level and subject, as far as the row has them."""
        return labels_of(record, self._labels)


def as_source(source: DataSource | str | Path) -> DataSource:
    """A source; a path alone is a file with the fields that the configuration names."""
    return source if isinstance(source, DataSource) else DataSource(path=str(source))


def _chosen(
    use: str,
    key: str | None,
    of_preset: Extract | None,
    default: str,
    read: Callable[[Record, str], str] = Record.text,
) -> Extract:
    """How to find what the row is to be used for, with advice where it is not there."""
    chosen = default if key is None else key
    if key is None and of_preset is not None:
        extract = of_preset
        advice = "; expected a row of the source's preset"
    else:
        extract = lambda record: read(record, chosen)  # noqa: E731
        option = f"data.{use}_field" if key is None else f"the source's fields.{use}"
        advice = f"; expected the key that {option} names, or correct the row"

    def advised(record: Record) -> str:
        try:
            return extract(record)
        except MissingField as error:
            raise BrokenRow(f"{error}{advice}{_hint(record, None)}") from None

    return advised


def _of_this_set(preset: str, question: Extract) -> Extract:
    """Refuses rows that bear the marks of another set."""

    def checked(record: Record) -> str:
        fitting = presets_that_fit(record)
        if fitting and preset not in fitting:
            raise _not_of(record, preset, f"has {', '.join(sorted(record.fields)[:12])}")
        try:
            text = question(record)
        except BrokenRow as error:
            raise BrokenRow(f"{error} ({preset}: {EXPECTED[preset]})") from None
        return text

    return checked


def _number_of(preset: str, answer: Extract) -> Extract:
    """Refuses answers that are none of a set in which all are numbers."""

    def checked(record: Record) -> str:
        text = answer(record)
        if not is_number(text):
            raise _not_of(record, preset, f"has the answer {shown(text)}, which is no number")
        return text

    return checked


def _not_of(record: Record, preset: str, found: str) -> BrokenRow:
    return BrokenRow(
        f"{record.source}: no row of the preset {preset}: it {found}; expected "
        f"{EXPECTED[preset]}{_hint(record, preset)}"
    )


def _hint(record: Record, preset: str | None) -> str:
    """The preset that a row fits, if one is known."""
    fitting = [name for name in presets_that_fit(record) if name != preset]
    return f"; the preset that fits is {fitting[0]}" if fitting else ""
