"""Write the tables of all options into docs/configuration.md, from the schema's docstrings.

Run it after a change of the schema: `python tools/make_configuration_docs.py`. A test fails while
the committed page is behind.
"""

from __future__ import annotations

import argparse
import json
import sys
import types
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from nested_reft_mcore.config.base import Section
from nested_reft_mcore.config.schema import Config

PAGE = Path(__file__).parents[1] / "docs" / "configuration.md"
BEGIN = "<!-- options: written by tools/make_configuration_docs.py -->"
END = "<!-- end of options -->"


def render_options() -> str:
    """A table for every section, in the order of the schema."""
    top = {name: field for name, field in Config.model_fields.items() if not _section(field)}
    parts = ["### Top level", "", *_table(top), ""]
    lists: dict[type[Section], str] = {}
    for name, field in Config.model_fields.items():
        section = _section(field)
        if section is not None:
            parts += _render_section(name, section, field, lists)
    return "\n".join(parts).rstrip() + "\n"


def page_with_options(page: str) -> str:
    """The page with its tables replaced.

    Raises:
        ValueError: the page lacks the marks between which the tables stand.
    """
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{PAGE.name}: expected the marks {BEGIN} and {END}")
    return f"{before}{BEGIN}\n\n{render_options()}\n{END}{after}"


def _render_section(
    name: str, section: type[Section], field: FieldInfo, lists: dict[type[Section], str]
) -> list[str]:
    """Heading, description and table of a section, then its inner sections.

    `lists` has the sections that stand in lists, with the heading where their options are told.
    """
    about = " ".join((section.__doc__ or "").split())
    if get_origin(field.annotation) is tuple:
        about = f"A list. {about}"
    if section in lists:
        return [f"### {name}", "", f"{field.description} Options as those of {lists[section]}.", ""]
    if get_origin(field.annotation) is tuple:
        lists[section] = name
    # A section's own docstring may begin with what the field says of it.
    if field.description and not about.startswith(field.description):
        about = f"{field.description} {about}"
    plain = {key: inner for key, inner in section.model_fields.items() if not _section(inner)}
    # A section may be filled with other defaults than its class has.
    filled = field.default if isinstance(field.default, Section) else None
    parts = [f"### {name}", "", about, "", *_table(plain, filled), ""]
    for key, inner in section.model_fields.items():
        deeper = _section(inner)
        if deeper is not None:
            parts += _render_section(f"{name}.{key}", deeper, inner, lists)
    return parts


def _table(fields: dict[str, FieldInfo], filled: Section | None = None) -> list[str]:
    rows = ["| option | values | default | meaning |", "|---|---|---|---|"]
    for name, field in fields.items():
        if field.is_required():
            default = "required"
        else:
            default = f"`{_plain(getattr(filled, name) if filled else field.default)}`"
        meaning = (field.description or "").replace("|", "\\|").replace("\n", " ")
        rows.append(f"| `{name}` | {_values(field)} | {default} | {meaning} |")
    return rows


def _plain(value: Any) -> str:
    """A default as one writes it in YAML."""
    if value is PydanticUndefined:
        return ""
    # A line break would end the table's row: such a text stands in quotes, as YAML escapes it.
    if isinstance(value, str) and value.isprintable():
        return value.replace("|", "\\|") or '""'
    return json.dumps(value)


def _values(field: FieldInfo) -> str:
    """The values that an option takes, in words."""
    return _bounded(_type_name(field.annotation), field)


def _bounded(text: str, field: FieldInfo) -> str:
    if any(getattr(limit, "min_length", None) for limit in field.metadata):
        text = f"non-empty {text}"
    signs = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}
    bounds = [
        f"{sign} {getattr(limit, name)}"
        for limit in field.metadata
        for name, sign in signs.items()
        if getattr(limit, name, None) is not None
    ]
    if not bounds:
        return text
    plain = text.removesuffix(" or null")
    return f"{plain} {', '.join(bounds)}" + (", or null" if plain != text else "")


def _type_name(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind, field = arguments
        return _bounded(_type_name(kind), field)
    if origin is Literal:
        return ", ".join(f"`{choice}`" for choice in arguments)
    if origin in (Union, types.UnionType):
        return " or ".join(_type_name(choice) for choice in arguments)
    if origin is tuple:
        return f"list of {_type_name(arguments[0])}"
    if origin is dict:
        return "mapping"
    names = {int: "integer", float: "number", str: "text", bool: "`true`, `false`"}
    return names.get(annotation, "null" if annotation is type(None) else str(annotation))


def _section(field: FieldInfo) -> type[Section] | None:
    """The section that a field holds, if it holds one."""
    for choice in (field.annotation, *get_args(field.annotation)):
        if isinstance(choice, type) and issubclass(choice, Section):
            return choice
    return None


def main() -> int:
    """Bring the page up to date; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--check", action="store_true", help="write nothing; leave with 1 if the page is behind"
    )
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    current = page_with_options(page)
    if options.check:
        print(f"{PAGE}: {'up to date' if page == current else 'behind the schema'}")
        return int(page != current)
    PAGE.write_text(current, encoding="utf-8")
    print(f"wrote {PAGE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
