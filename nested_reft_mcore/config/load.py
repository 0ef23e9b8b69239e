"""From a YAML file and overrides to a checked `Config`.

Relative paths in a configuration (`run_dir`, `data.*_path`, `data.tokenizer_path`, `model.hf_path`,
`model.checkpoint`, `rollout.replay`, `checkpoint.resume`) are kept as written, so they are taken
relative to the current working directory, not to the file.
"""

from __future__ import annotations

import difflib
import json
import types
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, Union, cast, get_args, get_origin

from pydantic import ValidationError
from pydantic.fields import FieldInfo

from nested_reft_mcore.config.base import Section
from nested_reft_mcore.config.checks import check_config
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.config.yaml_reader import YamlFile, parse_value, read_yaml, write_yaml

SectionType = TypeVar("SectionType", bound=Section)

CONFIG_FILE = "config.yaml"
"""The resolved configuration of a run, in its directory and in its checkpoints."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a configuration file, apply `section.field=value` overrides, and check the result.

    Without a file the overrides are all there is.

    Raises:
        UserError: for whatever is wrong with it; all mistakes of one kind are told at once.
    """
    file = YamlFile(Path("command line"), {}, {}) if path is None else read_yaml(path)
    sources = file.sources
    data = file.data
    for override in overrides:
        key, value = parse_override(override)
        _set(data, key, value, override)
        sources[key] = f"override {override!r}"
    config = section_from_dict(Config, data, str(file.path), sources)
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{file.path}: {error}") from None
    return config


def config_from_dict(data: Mapping[str, Any], source: str = "config") -> Config:
    """Rebuild the configuration that a checkpoint or run directory holds as plain values.

    Raises:
        UserError: unknown keys, wrong types or contradictions; the message starts with `source`.
    """
    config = section_from_dict(Config, data, source)
    try:
        check_config(config)
    except UserError as error:
        raise UserError(f"{source}: {error}") from None
    return config


def dump_config(config: Config, path: str | Path) -> None:
    """Write every option with its resolved value; `load_config` reads it back unchanged."""
    write_yaml(path, config.model_dump(mode="json"))


def parse_override(override: str) -> tuple[str, Any]:
    """Split `section.field=value` into the dotted key and the value as YAML reads it.

    Raises:
        UserError: no `=`, an empty name, or a value that is not YAML.
    """
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not all(key.split(".")):
        raise UserError(f"override {override!r}: expected section.field=value")
    return key, parse_value(text, f"override {override!r}")


def section_from_dict(
    section: type[SectionType],
    data: Mapping[str, Any],
    source: str,
    sources: Mapping[str, str] | None = None,
) -> SectionType:
    """Validate plain values strictly: no text becomes a number, no number a truth value.

    `sources` maps dotted keys to the place where they are set; other keys are blamed on `source`.

    Raises:
        UserError: names the dotted key, what was found, what is expected and what the option is.
    """
    try:
        # JSON is the strict form that still takes lists for tuples and integers for floats.
        return section.model_validate_json(json.dumps(data), strict=True)
    except ValidationError as error:
        found = _first_causes(dict(problem) for problem in error.errors())
        problems = [_explain(section, problem, source, sources or {}) for problem in found]
        raise UserError("\n".join(problems)) from None
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: a value is neither number, text, list nor section: {error}"
        ) from None


def _first_causes(problems: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Without lists that are too short because their items are wrong."""
    found = list(problems)
    owners = {problem["loc"][:-1] for problem in found}
    return [p for p in found if p["type"] != "too_short" or p["loc"] not in owners]


def _set(data: dict[str, Any], key: str, value: Any, override: str) -> None:
    """Put `value` at the dotted `key`, making sections on the way."""
    *parents, last = key.split(".")
    here = data
    for depth, name in enumerate(parents):
        inner: Any = here.get(name)
        if inner is None:
            inner = here[name] = {}
        if not isinstance(inner, dict):
            owner = ".".join(parents[: depth + 1])
            raise UserError(f"override {override!r}: `{owner}` is a value, not a section")
        here = cast(dict[str, Any], inner)
    here[last] = value


def _explain(
    root: type[Section], problem: dict[str, Any], source: str, sources: Mapping[str, str]
) -> str:
    """One sentence for one of pydantic's problems."""
    names = [str(part) for part in problem["loc"]]
    key = ".".join(names)
    where = next(
        (
            sources[".".join(names[:n])]
            for n in range(len(names), 0, -1)
            if ".".join(names[:n]) in sources
        ),
        source,
    )
    if problem["type"] == "extra_forbidden":
        return f"{where}: unknown key `{key}`{_suggest(root, names)}"
    field = _field(root, names)
    about = f" ({field.description})" if field is not None and field.description else ""
    if problem["type"] == "missing":
        return f"{where}: `{key}` is missing{about}"
    message = str(problem["msg"]).removeprefix("Input should be ").removeprefix("Value error, ")
    return f"{where}: `{key}`: expected {message}, got {_show(problem['input'])}{about}"


def _show(value: Any) -> str:
    """A found value with its type, short."""
    if value is None:
        return "nothing (null)"
    kinds: dict[type[Any], str] = {
        bool: "boolean",
        int: "integer",
        float: "number",
        str: "text",
        list: "list",
    }
    kind = next((name for known, name in kinds.items() if isinstance(value, known)), "section")
    return f"{kind} {json.dumps(value)[:80]}"


def _section_of(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, alone or in a list, if it holds one."""
    annotation = field.annotation
    several = get_origin(annotation) in (Union, types.UnionType, tuple)
    for choice in get_args(annotation) if several else (annotation,):
        if isinstance(choice, type) and issubclass(choice, Section):
            return choice
    return None


def _field(root: type[Section], names: Sequence[str]) -> FieldInfo | None:
    """The field at a dotted key."""
    section: type[Section] | None = root
    field: FieldInfo | None = None
    for name in names:
        if name.isdigit():  # a place in a list of sections
            continue
        if section is None or name not in section.model_fields:
            return field
        field = section.model_fields[name]
        section = _section_of(field)
    return field


def all_fields(root: type[Section], prefix: str = "") -> dict[str, FieldInfo]:
    """Every field under `root` by dotted key, sections included, in order."""
    found: dict[str, FieldInfo] = {}
    for name, field in root.model_fields.items():
        key = f"{prefix}{name}"
        found[key] = field
        inner = _section_of(field)
        if inner is not None:
            found |= all_fields(inner, f"{key}.")
    return found


def _suggest(root: type[Section], names: Sequence[str]) -> str:
    """The nearest known key: first in the same section, then the same name anywhere."""
    known = list(all_fields(root))
    *parents, last = (name for name in names if not name.isdigit())
    prefix = "".join(f"{parent}." for parent in parents)
    siblings = [key.removeprefix(prefix) for key in known if key.startswith(prefix)]
    siblings = [name for name in siblings if "." not in name]
    near = difflib.get_close_matches(last, siblings, n=1)
    if near:
        return f"; did you mean `{'.'.join((*names[:-1], near[0]))}`?"
    namesakes = [key for key in known if key.rsplit(".", 1)[-1] == last]
    if namesakes:
        return f"; did you mean `{namesakes[0]}`?"
    return f"; known here: {', '.join(siblings)}"
