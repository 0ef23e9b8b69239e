"""What a row of a data set means: the fields that its preset or the configuration names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nested_reft_mcore.config.data import DataConfig, DataSource
from nested_reft_mcore.data.presets import PRESETS, Extract, labels_of
from nested_reft_mcore.data.records import Record


class RowReader:
    """Question, answer, worked answer and labels of the rows of one source.

    A key that the source itself names wins over its preset, and that over the configuration's.
    """

    def __init__(self, source: DataSource, config: DataConfig) -> None:
        fields = source.fields
        preset = None if source.preset is None else PRESETS[source.preset]
        self.question: Extract = _chosen(
            fields.prompt, preset and preset.question, config.prompt_field
        )
        """The question alone. BrokenRow where the row has none."""
        self.answer: Extract = _chosen(
            fields.answer, preset and preset.answer, config.answer_field, Record.number_or_text
        )
        """The expected answer. BrokenRow where the row has none."""
        self.demonstration: Extract = _chosen(
            fields.demonstration, preset and preset.demonstration, config.demonstration_field
        )
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


def _chosen(key: str | None, of_preset: Extract | None, default: str, read=Record.text) -> Extract:
    if key is None and of_preset is not None:
        return of_preset
    chosen = default if key is None else key
    return lambda record: read(record, chosen)
