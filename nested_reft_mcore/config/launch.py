"""How the processes of a job come together, and how they notice that one is gone."""

from typing import Literal

from pydantic import Field

from nested_reft_mcore.config.base import Section


class LaunchConfig(Section):
    """Meeting, preflight and the watch over the other processes; docs/operations.md tells more."""

    preflight: Literal["auto", "always", "never"] = "auto"
    """Check nodes, files and links before a run; `auto` where there are several processes."""
    require_gpu: bool = False
    """Preflight refuses a process that sees no GPU, instead of using the CPU."""
    preflight_deadline_seconds: float = Field(default=60.0, gt=0)
    """A check of the preflight that takes longer has failed."""
    join_deadline_seconds: float = Field(default=600.0, gt=0)
    """So long the first processes wait for the last one at the start."""
    peer_deadline_seconds: float = Field(default=60.0, ge=5.0)
    """A process that is silent for so long, stopped or on a dead node, counts as lost."""
