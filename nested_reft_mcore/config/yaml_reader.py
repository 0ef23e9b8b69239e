"""YAML as a configuration needs it: the core types of YAML 1.2, no duplicate keys, line numbers.

PyYAML follows YAML 1.1, where `1e-4` is a string and `off` is a boolean. Here `1e-4` is a number,
only `true` and `false` are booleans, and dates stay strings.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import yaml

from nested_reft_mcore.config.errors import UserError

_INTEGER = re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$")
_FLOAT = re.compile(r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$")
_MERGE_TAG = "tag:yaml.org,2002:merge"


class _StrictLoader(yaml.SafeLoader):
    """Safe loader with the core schema of YAML 1.2."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012


class _Dumper(yaml.SafeDumper):
    """Safe dumper that quotes every string which `_StrictLoader` would read as a number."""

    def ignore_aliases(self, data: Any) -> bool:
        """Write repeated values out in full."""
        return True


def _resolve(target: Any, kind: str, pattern: str | re.Pattern[str], first: list[str]) -> None:
    """Teach a loader or dumper that plain text like `pattern` is of this kind."""
    target.add_implicit_resolver(f"tag:yaml.org,2002:{kind}", re.compile(pattern), first)


_resolve(_StrictLoader, "null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""])
_resolve(_StrictLoader, "bool", r"^(?:true|True|TRUE|false|False|FALSE)$", list("tTfF"))
_resolve(_StrictLoader, "int", _INTEGER, list("-+0123456789"))
_resolve(_StrictLoader, "float", _FLOAT, list("-+.0123456789"))
_resolve(_StrictLoader, "merge", r"^<<$", ["<"])
_resolve(_Dumper, "float", _FLOAT, list("-+.0123456789"))


@dataclass(frozen=True)
class YamlFile:
    """The mapping in a file, and the line of every dotted key."""

    path: Path
    data: dict[str, Any]
    lines: Mapping[str, int]

    @property
    def sources(self) -> dict[str, str]:
        """`FILE:LINE` of every dotted key."""
        return {key: f"{self.path}:{line}" for key, line in self.lines.items()}


def read_yaml(path: str | Path) -> YamlFile:
    """Read a file whose top level is a mapping.

    Raises:
        UserError: the file is missing, unreadable, not YAML, has a key twice, or holds no mapping;
            the message starts with `FILE:` or `FILE:LINE:`.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; expected a YAML configuration") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory; expected a YAML configuration file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not a text file: {error.reason} at byte {error.start}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    lines: dict[str, int] = {}
    data = _load(text, str(path), lines)
    if not isinstance(data, dict):
        found = "an empty file" if data is None else f"{type(data).__name__} {data!r:.60}"
        raise UserError(
            f"{path}: expected sections (`section:`, then `  field: value`), got {found}"
        )
    return YamlFile(path, cast(dict[str, Any], data), lines)


def parse_value(text: str, source: str) -> Any:
    """Parse the value of an override, a YAML scalar, list or mapping.

    Raises:
        UserError: it is not YAML; the message names `source`.
    """
    return _load(text, source, {})


def write_yaml(path: str | Path, data: Mapping[str, Any]) -> None:
    """Write a mapping so that `read_yaml` gives it back, keys in the given order."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The stub's own overloads are partly untyped.
    text: str = yaml.dump(  # pyright: ignore[reportUnknownMemberType]
        dict(data), Dumper=_Dumper, sort_keys=False, allow_unicode=True
    )
    path.write_text(text, encoding="utf-8")


def _load(text: str, source: str, lines: dict[str, int]) -> Any:
    """Parse `text`; fill `lines` with the 1-based line of every dotted key."""
    loader: Any = None
    try:
        loader = _StrictLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _note_lines(node, "", source, lines)
        return loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"{source}:{mark.line + 1}" if mark else source
        raise UserError(f"{where}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        raise UserError(f"{source}: not valid YAML: {error.reason}") from None
    except RecursionError:
        raise UserError(f"{source}: not valid YAML: nested too deeply") from None
    except ValueError as error:
        raise UserError(f"{source}: not valid YAML: {error}") from None
    finally:
        if loader is not None:
            loader.dispose()


def _note_lines(node: yaml.Node, prefix: str, source: str, lines: dict[str, int]) -> None:
    """Record where keys are, and refuse a key that stands twice in one mapping."""
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    pairs: list[tuple[yaml.Node, yaml.Node]] = node.value
    for key_node, value_node in pairs:
        line = key_node.start_mark.line + 1
        if not isinstance(key_node, yaml.ScalarNode):
            raise UserError(f"{source}:{line}: expected a name as key, got a list or mapping")
        if key_node.tag == _MERGE_TAG:
            continue
        key = str(key_node.value)
        path = f"{prefix}.{key}" if prefix else key
        if key in seen:
            raise UserError(f"{source}:{line}: `{path}` is already set at line {seen[key]}")
        seen[key] = line
        lines[path] = line
        _note_lines(value_node, path, source, lines)
