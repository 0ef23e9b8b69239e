"""Which of the usual data sets a row is of, by what only that set's rows have.

Sets for mathematics resemble each other, so many a row can be read under the wrong preset, and its
answers are then wrong without a word. A row that bears the marks of another set is refused.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from nested_reft_mcore.data.answers import HASHES
from nested_reft_mcore.data.records import Record

PLACEHOLDER = re.compile(r"\bnumber(\d+)\b")
"""What stands for a number in the questions of the CSV files of MAWPS and ASDiv."""
_NUMBER = re.compile(r"-?[\d,]+(\.\d+)?(/\d+)?%?")
NUMERIC = ("svamp", "mawps", "aime24", "amc23")
"""Presets of sets whose answers are all numbers."""
EXPECTED: Mapping[str, str] = {
    "gsm8k": "`question`, and `answer` that ends in `#### ANSWER`",
    "svamp": "`Body`, `Question` and a number as `Answer`",
    "mawps": "`input` and `target`, or `Question`, `Numbers` and `Answer`",
    "math": "`reward_model.ground_truth`, or `problem` and `solution`",
    "math12k": "`prompt`, `answer` and `demonstration`, as `nested-reft data math12k` writes them",
    "math500": "`problem` and `answer`, or `reward_model.ground_truth`",
    "aime24": "`problem` and a number as `answer`",
    "amc23": "`problem` and a number as `answer`",
    "minerva": r"`problem` and `solution` with its answer in \boxed{}",
    "olympiadbench": "`question` and a list as `final_answer`",
}
"""What rows of each preset have, for messages."""


def presets_that_fit(record: Record) -> tuple[str, ...]:
    """Presets whose marks a row bears, the likeliest first; empty where it bears none."""
    return tuple(dict.fromkeys(name for bears, names in _MARKS if bears(record) for name in names))


def is_number(text: str) -> bool:
    """Whether the answer is one number."""
    return _NUMBER.fullmatch(text.strip().strip("$").strip()) is not None


def _is_placeholder_row(record: Record) -> bool:
    question = record.fields.get("Question")
    is_open = isinstance(question, str) and PLACEHOLDER.search(question) is not None
    return record.has("Question") and (record.has("Numbers") or is_open)


def _has(*keys: str, without: tuple[str, ...] = ()) -> Callable[[Record], bool]:
    def bears(record: Record) -> bool:
        return all(map(record.has, keys)) and not any(map(record.has, without))

    return bears


def _says(key: str, pattern: str) -> Callable[[Record], bool]:
    found = re.compile(pattern, re.IGNORECASE)

    def bears(record: Record) -> bool:
        return isinstance(value := record.find(key), str) and found.search(value) is not None

    return bears


def _is_gsm8k(record: Record) -> bool:
    answer = record.find("answer")
    return record.has("question") and isinstance(answer, str) and HASHES in answer


_MATH = ("math", "math500")
_MARKS: tuple[tuple[Callable[[Record], bool], tuple[str, ...]], ...] = (
    (_is_placeholder_row, ("mawps",)),
    (_has("input", "target"), ("mawps",)),
    (
        lambda record: _has("Body", "Question")(record) and not _is_placeholder_row(record),
        ("svamp",),
    ),
    (_is_gsm8k, ("gsm8k",)),
    (_has("question", "final_answer"), ("olympiadbench",)),
    (_says("url", r"AIME"), ("aime24",)),
    (_says("url", r"AMC_1\d"), ("amc23",)),
    (_has("reward_model.ground_truth.target"), ("math",)),
    (_has("problem", "answer", "subject", "level"), ("math500", "math")),
    (_says("data_source", r"\bMATH\b"), _MATH),
    (_has("problem", "level"), _MATH),
    (
        _has("problem", "solution", "type", without=("level", "answer")),
        ("minerva",),
    ),
)
"""Marks, and the presets that rows with them may be read by."""
