"""A hardware profile as a file that `--hardware` reads, with a remark on every line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nested_reft_mcore.planning.hardware import HardwareProfile


def profile_yaml(profile: HardwareProfile, remarks: Mapping[str, str], heading: str) -> str:
    """The file's text.

    Args:
        profile: Every field and assumption is written, so that nothing hangs on later defaults.
        remarks: By name of a field or assumption; others have none.
        heading: The first line.
    """
    data = profile.model_dump(mode="json")
    assumptions = data.pop("assumptions")
    lines = [f"# {heading}"]
    lines += [_line(key, value, remarks) for key, value in data.items() if value is not None]
    lines.append("assumptions:")
    lines += ["  " + _line(key, value, remarks) for key, value in assumptions.items()]
    return "\n".join(lines) + "\n"


def _line(key: str, value: Any, remarks: Mapping[str, str]) -> str:
    if isinstance(value, float):
        value = float(f"{value:.4g}")
    # JSON is YAML: numbers, lists and quoted text alike.
    text = f"{key}: {json.dumps(value, ensure_ascii=False)}"
    return f"{text}  # {remarks[key]}" if remarks.get(key) else text
