"""One HTML file with everything in it: style, scripts and data.

Data stand in the page as base64 of deflated JSON. Whatever a completion holds, it cannot end a
script element, and half characters survive as JSON escapes. A content security policy keeps the
page from loading anything.
"""

from __future__ import annotations

import base64
import html
import json
import zlib
from collections.abc import Mapping
from importlib import resources
from typing import Any

SCRIPTS = ("base.js", "charts.js", "curves.js", "rollouts.js", "compare.js", "main.js")
_ASSETS = "nested_reft_mcore.report"


def packed(value: Any) -> str:
    """JSON, deflated (zlib's format, which browsers unpack themselves), in base64.

    Raises ValueError for a number that is not finite.
    """
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return base64.b64encode(zlib.compress(text.encode("ascii"), 6)).decode("ascii")


def render_page(title: str, blocks: Mapping[str, str]) -> str:
    """The page with `blocks`, packed data by element id, of which `overview` is shown first."""
    page = _asset("page.html")
    data = "\n".join(
        f'<script type="application/octet-stream" id="data-{name}">{text}</script>'
        for name, text in blocks.items()
    )
    parts = {
        "TITLE": html.escape(title.encode("utf-8", "replace").decode("utf-8")),
        "STYLE": _asset("page.css"),
        "DATA": data,
        "SCRIPT": "\n".join(_asset(name) for name in SCRIPTS),
    }
    for name, text in parts.items():
        before, mark, after = page.partition(f"<!--{name}-->")
        if not mark:
            raise ValueError(f"page.html has no mark for {name}")
        page = before + text + after
    return page


def _asset(name: str) -> str:
    return (resources.files(_ASSETS) / "assets" / name).read_text(encoding="utf-8")
