"""Whether rollouts of an earlier run may be learnt from."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.yaml_reader import read_yaml


def truncates(name: str, value: float | None) -> bool:
    """Whether `rollout.<name>`, `top_k` or `top_p`, leaves tokens out; verl writes a top_p of 1."""
    return value is not None and not (name == "top_p" and value == 1)


def check_replay(path: Path, temperature: float) -> None:
    """Refuse rollouts of another temperature, or of a truncated distribution: all log-probs of a
    ratio are at one temperature, and over all tokens.

    Args:
        path: `config.yaml` of the run that sampled them.
        temperature: of the run that learns from them.

    Raises:
        UserError: the file is not there, or says that they were sampled otherwise.
    """
    if not path.exists():
        raise UserError(
            f"rollout.replay: {path} does not exist; expected the run directory of `train`, which "
            "says at what temperature its rollouts were sampled"
        )
    rollout = cast(dict[str, Any], read_yaml(path).data.get("rollout") or {})
    recorded = rollout.get("temperature", 1.0)
    if recorded != temperature:
        raise UserError(
            f"rollout.temperature={temperature}, but the rollouts to replay were sampled at "
            f"{recorded} ({path}): every importance ratio would be wrong; expected "
            f"rollout.temperature={recorded}"
        )
    for name in ("top_k", "top_p"):
        value = rollout.get(name)
        if truncates(name, value):
            raise UserError(
                f"rollout.replay: its rollouts were sampled with rollout.{name}={value} ({path}): "
                "every importance ratio would be off by the kept mass; expected a run that "
                "samples from the full distribution"
            )
