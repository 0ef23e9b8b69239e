"""The usual data sets for mathematics, read from their own files as they are.

Questions come bare: an instruction that a file adds to each of them (`Let's think step by step
...`) is taken off, for `data.prompt_suffix` says it the same way for all sets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from nested_reft_mcore.data.answers import (
    after_hashes,
    last_boxed,
    number_text,
    without_calculator,
)
from nested_reft_mcore.data.layouts import PLACEHOLDER
from nested_reft_mcore.data.records import Record

Extract = Callable[[Record], str]

_INSTRUCTION = re.compile(
    r"\s*Let's think step by step and output the final answer within \\boxed\{\}\.\s*$"
)


@dataclass(frozen=True)
class Preset:
    """How to read a row. Each function raises BrokenRow where the row lacks what it needs."""

    question: Extract
    """The question alone, without instruction."""
    answer: Extract
    """The final answer alone."""
    demonstration: Extract
    """The worked answer, where the set has one; else the final answer."""
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Label to keys, the first of which that is there holds its value."""


def first_text(*keys: str) -> Extract:
    """Reads the first of `keys` that is there, as text without instruction."""

    def extract(record: Record) -> str:
        key = next((key for key in keys if record.has(key)), None)
        if key is None:
            raise record.missing(*keys)
        return _INSTRUCTION.sub("", record.text(key)).strip()

    return extract


def first_number(*keys: str) -> Extract:
    """Reads the first of `keys` that is there, a number or text; `27.0` becomes `27`."""

    def extract(record: Record) -> str:
        key = next((key for key in keys if record.has(key)), None)
        if key is None:
            raise record.missing(*keys)
        return number_text(record.number_or_text(key))

    return extract


def _gsm8k_answer(record: Record) -> str:
    solution = record.text("answer")
    answer = after_hashes(solution)
    if answer is None:
        raise record.wrong("answer", solution[-40:], "a solution that ends in `#### ANSWER`")
    return answer


def _gsm8k_demonstration(record: Record) -> str:
    return without_calculator(record.text("answer"))


def _body_and_question(record: Record) -> str:
    body, question = record.text("Body").strip(), record.text("Question").strip()
    # Many bodies end without a full stop.
    return f"{body} {question}" if body.endswith((".", ",", "?", "!")) else f"{body}. {question}"


def _mawps_question(record: Record) -> str:
    if not record.has("Numbers"):
        return first_text("input", "Question", "question")(record)
    numbers = [number_text(number) for number in record.number_or_text("Numbers").split()]

    def fill(found: re.Match[str]) -> str:
        place = int(found.group(1))
        if place >= len(numbers):
            raise record.wrong("Numbers", numbers, f"a number for {found.group(0)}")
        return numbers[place]

    return PLACEHOLDER.sub(fill, record.text("Question").strip())


_MATH_SOLUTIONS = ("reward_model.ground_truth.solution", "solution", "demonstration")


def _math_answer(record: Record) -> str:
    for key in ("reward_model.ground_truth.target", "answer"):
        if record.has(key):
            answer = record.number_or_text(key).strip()
            # Some targets are empty where the box holds text, and two boxes of the set are empty.
            # The chat form's targets have lost the backslashes that part the rows of a matrix.
            is_torn = "matrix}" in answer and r"\\" not in answer
            return (_boxed(record) or answer) if is_torn else (answer or _boxed(record) or "")
    return _boxed_answer(record)


def _boxed(record: Record) -> str | None:
    key = next((key for key in _MATH_SOLUTIONS if record.has(key)), None)
    return None if key is None else last_boxed(record.text(key))


def _boxed_answer(record: Record) -> str:
    key = next((key for key in _MATH_SOLUTIONS if record.has(key)), None)
    if key is None:
        raise record.missing(*_MATH_SOLUTIONS)
    solution = record.text(key)
    answer = last_boxed(solution)
    if answer is None:
        raise record.wrong(key, solution[-40:], r"a solution with its answer in \boxed{}")
    return answer


def _olympiad_question(record: Record) -> str:
    question = record.text("question").strip()
    return f"{record.text('context').strip()}\n{question}" if record.has("context") else question


def _olympiad_answer(record: Record) -> str:
    answers = record.array("final_answer")
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise record.wrong("final_answer", answers, "a list of texts, at least one")
    return ", ".join(answer.strip() for answer in answers)


def _olympiad_demonstration(record: Record) -> str:
    solutions = record.array("solution")
    if not solutions or not isinstance(solutions[0], str):
        raise record.wrong("solution", solutions, "a list of texts, at least one")
    return solutions[0]


def level_text(text: str) -> str:
    """`Level 5` as `5`."""
    return re.sub(r"^Level\s+", "", text.strip())


_MATH_LABELS = {"level": ("level",), "subject": ("subject", "type")}
_mawps_answer = first_number("target", "Answer", "answer")
_svamp_answer = first_number("Answer")
_contest_answer = first_number("answer")
_math_question = first_text("reward_model.ground_truth.question", "problem", "prompt.0.content")
_math_demonstration = first_text(*_MATH_SOLUTIONS)
_math = Preset(_math_question, _math_answer, _math_demonstration, _MATH_LABELS)

PRESETS: Mapping[str, Preset] = {
    "gsm8k": Preset(first_text("question"), _gsm8k_answer, _gsm8k_demonstration),
    "svamp": Preset(_body_and_question, _svamp_answer, _svamp_answer, {"subject": ("Type",)}),
    "mawps": Preset(_mawps_question, _mawps_answer, _mawps_answer),
    "math": _math,
    "math12k": Preset(
        first_text("prompt"), first_number("answer"), first_text("demonstration"), _MATH_LABELS
    ),
    "aime24": Preset(first_text("problem", "question"), _contest_answer, first_text("solution")),
    "amc23": Preset(first_text("problem", "question"), _contest_answer, _contest_answer),
    "math500": _math,
    "minerva": Preset(
        first_text("problem"), _boxed_answer, first_text("solution"), {"subject": ("type",)}
    ),
    "olympiadbench": Preset(
        _olympiad_question, _olympiad_answer, _olympiad_demonstration, {"subject": ("subfield",)}
    ),
}
"""By the name that `config.data.PresetName` lists."""


def labels_of(
    record: Record, keys_of_label: Mapping[str, tuple[str, ...]]
) -> tuple[tuple[str, str], ...]:
    """The labels of a row, `(name, value)`; those that it lacks are left out."""
    found = []
    for name, keys in keys_of_label.items():
        key = next((key for key in keys if record.has(key)), None)
        if key is not None:
            value = record.number_or_text(key).strip()
            found.append((name, level_text(value) if name == "level" else value))
    return tuple(found)
