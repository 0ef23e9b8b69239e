"""Where prompts come from and what is done to them before the policy reads them."""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import PurePath
from typing import Literal, get_args

from pydantic import Field

from nested_reft_mcore.config.base import Section
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.selection import SelectionConfig

PresetName = Literal[
    "gsm8k",
    "svamp",
    "mawps",
    "math",
    "math12k",
    "aime24",
    "amc23",
    "math500",
    "minerva",
    "olympiadbench",
]
PRESET_NAMES: tuple[str, ...] = get_args(PresetName)
"""Data sets whose own files are read as they are; `data/presets.py` says how."""

_HUB = "hub:"
_LABEL = r"[A-Za-z0-9][A-Za-z0-9_.@+-]*"


class FieldMapping(Section):
    """Which keys of a row hold what. `a.b` looks into an object, `a.0` into a list."""

    prompt: str | None = None
    """Key of the question; left out: the preset's, or `data.prompt_field`."""
    answer: str | None = None
    """Key of the expected answer; left out: the preset's, or `data.answer_field`."""
    demonstration: str | None = None
    """Key of the worked answer; left out: the preset's, or `data.demonstration_field`."""
    level: str | None = None
    """Key of the difficulty that evaluation is broken down by; left out: the preset's, if any."""
    subject: str | None = None
    """Key of the subject that evaluation is broken down by; left out: the preset's, if any."""


class DataSource(Section):
    """One data set: exactly one of `path` and `hub`."""

    path: str | None = None
    """File: JSON lines, JSON, CSV or parquet."""
    hub: str | None = None
    """Name on the Hugging Face hub, or a directory that `datasets` reads; needs the `hub` extra."""
    subset: str | None = None
    """Configuration of the hub's data set, as in `main` of openai/gsm8k."""
    split: str = "train"
    """Split of the hub's data set."""
    name: str | None = Field(default=None, pattern=f"^{_LABEL}$")
    """What metrics and tables call it; left out: the preset's name, or the file's."""
    preset: PresetName | None = None
    """A known data set, whose own fields are read and whose answers are extracted."""
    format: Literal["auto", "jsonl", "json", "csv", "parquet"] = "auto"
    """Format of the file; `auto` goes by its ending, and by its first character for .json."""
    weight: float | None = Field(default=None, gt=0)
    """Share of the prompts in a mixture, relative to the others; left out everywhere: by size."""
    fields: FieldMapping = FieldMapping()
    """Which keys of a row hold what."""
    limit: int | None = Field(default=None, gt=0)
    """Read at most this many rows; left out: `data.limit`."""

    @property
    def label(self) -> str:
        """What metrics and tables call it: its name, its preset's, or that of its file."""
        if self.name is not None:
            return self.name
        if self.preset is not None:
            return self.preset
        whole = (self.path or self.hub or "").rstrip("/")
        return re.sub(r"[^A-Za-z0-9_.@+-]", "_", PurePath(whole).name.split(".")[0]) or "data"

    @property
    def place(self) -> str:
        """The file, or the hub's name with subset and split, as errors name it."""
        if self.path is not None:
            return self.path
        subset = f":{self.subset}" if self.subset is not None else ""
        return f"{self.hub}{subset}@{self.split}"


class DataConfig(Section):
    """Prompts with verifiable answers; docs/data.md tells more."""

    train_path: str | None = None
    """File to train on: JSON lines, JSON, CSV or parquet. Short for a single entry of `train`."""
    eval_path: str | None = None
    """File held out for evaluation. Short for a single entry of `eval`."""
    train: tuple[DataSource, ...] = ()
    """Instead of `train_path`: data sets to train on, with weights."""
    eval: tuple[DataSource, ...] = ()
    """Instead of `eval_path`: data sets held out for evaluation, each with its own figures."""
    prompt_field: str = "prompt"
    """Key of the question in a row; `a.b` looks into an object, `a.0` into a list."""
    answer_field: str = "answer"
    """Key of the expected answer in a row."""
    demonstration_field: str = "demonstration"
    """Key of the worked answer that `sft` learns from."""
    tokenizer_path: str | None = None
    """Hugging Face tokenizer directory or sentencepiece `.model` file; default: the model's own."""
    template: Literal["none", "chat"] = "none"
    """`chat` puts prompts through the tokenizer's chat template, or that of `template_path`."""
    template_path: str | None = None
    """Jinja file with a chat template of your own; needs `template: chat`."""
    system_prompt: str | None = None
    """First message of a chat prompt."""
    prompt_suffix: str = ""
    """Text added to every question."""
    add_bos: bool = False
    """Begin prompts without a template with the tokenizer's beginning-of-sequence token."""
    few_shot: DataSource | None = None
    """Solved examples to put before every question, from their worked answers."""
    num_few_shot: int = Field(default=0, ge=0)
    """How many of them: the first ones of the file that are not the question itself."""
    few_shot_template: str = "{question}\n{answer}\n\n"
    """An example where there is no chat template; with one, examples are turns of the chat."""
    max_prompt_length: int = Field(default=1024, gt=0)
    """Longest prompt, in tokens, template and examples included."""
    overlong_prompts: Literal["drop", "truncate_left", "error"] = "drop"
    """A longer one is left out, loses its beginning, or ends the run; the first two are counted."""
    broken_rows: Literal["error", "skip"] = "error"
    """A row that cannot be used ends the run, or is left out and counted."""
    limit: int | None = Field(default=None, gt=0)
    """Read at most this many rows of each source."""
    selection: SelectionConfig = SelectionConfig()
    """Which prompts a step takes from the stream; docs/data.md has the formulas."""


def train_sources(data: DataConfig) -> tuple[DataSource, ...]:
    """What to train on, whichever way it is given; may be empty."""
    return data.train if data.train_path is None else (DataSource(path=data.train_path),)


def eval_sources(data: DataConfig) -> tuple[DataSource, ...]:
    """What to evaluate on, whichever way it is given; may be empty."""
    return data.eval if data.eval_path is None else (DataSource(path=data.eval_path),)


def data_paths(data: DataConfig) -> Iterator[tuple[str, str]]:
    """Every file that a run reads its data from, with the key that names it."""
    for key in ("train_path", "eval_path", "tokenizer_path", "template_path"):
        path = getattr(data, key)
        if path is not None:
            yield f"data.{key}", path
    for key, source in _listed(data):
        if source.path is not None:
            yield f"{key}.path", source.path


def check_data(data: DataConfig) -> None:
    """Refuse data sets that are named twice or half, and templates without their file.

    Raises:
        UserError: names the options and what they say.
    """
    for short, full in (("train_path", data.train), ("eval_path", data.eval)):
        if getattr(data, short) is not None and full:
            raise UserError(f"data.{short} and data.{short[:-5]} are both set; set one of them")
    for key, source in _listed(data):
        _check_source(key, source)
    for key, sources in (("data.train", data.train), ("data.eval", data.eval)):
        _check_list(key, sources)
    if data.template_path is not None and data.template != "chat":
        raise UserError(
            f"data.template_path={data.template_path} is a chat template; expected data.template: "
            "chat with it"
        )
    if data.system_prompt is not None and data.template != "chat":
        raise UserError(
            "data.system_prompt is the first message of a chat; expected data.template: chat with "
            "it (without a template, say it in data.prompt_suffix)"
        )
    _check_selection(data.selection)
    if data.num_few_shot and data.few_shot is None:
        raise UserError(
            f"data.num_few_shot={data.num_few_shot} needs data.few_shot, where examples come from"
        )
    if data.few_shot is not None and not data.num_few_shot:
        raise UserError("data.few_shot names examples, and data.num_few_shot=0 takes none of them")
    missing = [name for name in ("{question}", "{answer}") if name not in data.few_shot_template]
    if missing:
        raise UserError(
            f"data.few_shot_template={data.few_shot_template!r} lacks {' and '.join(missing)}"
        )


def parse_source(text: str) -> DataSource:
    """A data set from the command line: `NAME=PATH`, `NAME:PRESET=PATH`, or `PATH` alone.

    NAME is that of a preset, or any other: then rows have the fields that the configuration names.
    PATH is a file, or `hub:OWNER/SET`, with `:SUBSET` and `@SPLIT` after it where they are needed.

    Raises:
        UserError: it is not of this form, or names a preset that is not known, or nearly one.
    """
    name, equals, where = text.partition("=")
    if not equals or "/" in name:
        name, where = "", text
    name, _, preset = name.partition(":")
    if preset and preset not in PRESET_NAMES:
        near = difflib.get_close_matches(preset, PRESET_NAMES, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(
            f"{text}: no preset {preset!r}; known ones: {', '.join(PRESET_NAMES)}{hint}"
        )
    if not where or (equals and not name and where != text):
        raise UserError(f"{text}: expected NAME=PATH, NAME:PRESET=PATH or PATH")
    if name and not re.fullmatch(_LABEL, name):
        raise UserError(f"{text}: {name!r} is no name; expected letters, digits and _ . @ + -")
    if not preset and (meant := _mistyped_preset(name)) is not None:
        raise UserError(
            f"{text}: {name!r} is no preset, and nearly one; did you mean {meant}={where}, or "
            f"{name}:{meant}={where}? A set of your own needs another name"
        )
    known = preset or (name if name in PRESET_NAMES else None)
    # Names of presets are checked above: the rest is for the type checker.
    given = {"name": name or None, "preset": known}
    if not where.startswith(_HUB):
        return DataSource.model_validate(given | {"path": where})
    found = re.fullmatch(r"([^:@]+)(?::([^:@]+))?(?:@([^:@]+))?", where.removeprefix(_HUB))
    if found is None:
        raise UserError(f"{text}: expected hub:OWNER/SET[:SUBSET][@SPLIT]")
    hub, subset, split = found.groups()
    return DataSource.model_validate(
        given | {"hub": hub, "subset": subset, "split": split or "train"}
    )


def _mistyped_preset(name: str) -> str | None:
    """The preset that a name was meant to be; None where it is one, or clearly another name.

    Another number (aime25) and a part behind a separator (gsm8k_hard) make another set.
    """
    if not name or name in PRESET_NAMES:
        return None
    bare = re.sub(r"[^a-z0-9]", "", name.lower())
    if bare in PRESET_NAMES:
        return bare
    for preset in PRESET_NAMES:
        if re.match(rf"{preset}[^A-Za-z0-9]", name, re.IGNORECASE):
            return None
        if re.sub(r"\d", "", bare) == re.sub(r"\d", "", preset):
            return None
    near = difflib.get_close_matches(bare, PRESET_NAMES, n=1, cutoff=0.8)
    return near[0] if near else None


def _listed(data: DataConfig) -> Iterator[tuple[str, DataSource]]:
    for key, sources in (("train", data.train), ("eval", data.eval)):
        for place, source in enumerate(sources):
            yield f"data.{key}.{place}", source
    if data.few_shot is not None:
        yield "data.few_shot", data.few_shot


def _check_selection(selection: SelectionConfig) -> None:
    if selection.solved_at <= selection.hopeless_at:
        raise UserError(
            f"data.selection.solved_at={selection.solved_at:g} is not above "
            f"data.selection.hopeless_at={selection.hopeless_at:g}: a group would be both"
        )


def _check_source(key: str, source: DataSource) -> None:
    if (source.path is None) == (source.hub is None):
        found = "neither" if source.path is None else "both"
        raise UserError(f"{key}: expected exactly one of path and hub, found {found}")
    if source.hub is None and (source.subset is not None or source.split != "train"):
        raise UserError(f"{key}: subset and split belong to a hub's data set; {source.path} is not")


def _check_list(key: str, sources: tuple[DataSource, ...]) -> None:
    counts = Counter(source.label for source in sources)
    twice = sorted(label for label, count in counts.items() if count > 1)
    if twice:
        raise UserError(f"{key}: two sources are called {twice[0]!r}; tell them apart by `name`")
    without = [source.label for source in sources if source.weight is None]
    if without and len(without) < len(sources):
        raise UserError(
            f"{key}: {', '.join(without)} has no weight and others have one; expected a weight for "
            "all of them or for none"
        )
