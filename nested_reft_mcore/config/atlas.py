"""Options of `nested-reft atlas`, and what is wrong with them before anything is enumerated."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field

from nested_reft_mcore.config.base import Section
from nested_reft_mcore.config.errors import UserError


class AtlasOptions(Section):
    """`nested-reft atlas`: bias and variance of every estimator, by layers skipped."""

    layers: int = Field(default=8, gt=0)
    """Layers of the toy policies."""
    skipped: str = "0,1,2,3,4"
    """How many of them to skip, one after the other."""
    border_layers: int = Field(default=1, ge=0)
    """Layers at either end that are never skipped."""
    plans: int = Field(default=6, gt=0)
    """At most so many plans for each number of skipped layers."""
    seeds: int = Field(default=3, gt=0)
    """Toy policies; figures are means over them."""
    vocabulary: int = Field(default=4, ge=3, le=8)
    """Tokens, the end token among them."""
    tokens: int = Field(default=5, gt=0, le=8)
    """Tokens of the longest completion."""
    batch_sizes: str = "16,64,256,1024"
    """Completions in a batch, one size after the other."""
    output: str | None = None
    """Directory for atlas.json, atlas.md and atlas.png."""

    @property
    def depths(self) -> tuple[int, ...]:
        """`skipped` as numbers, ascending. UserError if they cannot be read or skipped."""
        if self.layers < 2 * self.border_layers:
            raise UserError(
                f"--layers {self.layers}: with --border-layers {self.border_layers} at least "
                f"{2 * self.border_layers} layers are kept; expected as many, or --border-layers "
                f"{self.layers // 2}"
            )
        most = self.layers - 2 * self.border_layers
        found = _whole_numbers("--skipped", self.skipped)
        for count in found:
            if count > most:
                raise UserError(
                    f"--skipped {self.skipped}: {count} layers, but of {self.layers} with "
                    f"--border-layers {self.border_layers} kept at either end at most "
                    f"{max(most, 0)} can be skipped"
                )
        return found

    @property
    def sizes(self) -> tuple[int, ...]:
        """`batch_sizes` as numbers, ascending. UserError if they cannot be read."""
        found = _whole_numbers("--batch-sizes", self.batch_sizes)
        if not 1 <= found[0] <= found[-1] <= MAX_BATCH_SIZE:
            raise UserError(
                f"--batch-sizes {self.batch_sizes}: expected sizes from 1 to {MAX_BATCH_SIZE}"
            )
        return found


MAX_BATCH_SIZE = 4096
"""The law of a batch's denominator is computed exactly, in time that grows with its square."""


def check_atlas(options: AtlasOptions) -> None:
    """Refuse options that cannot be read or contradict each other.

    Raises:
        UserError: names the option, what it says and what was expected.
    """
    _ = options.depths, options.sizes
    if options.output is not None:
        path = Path(options.output)
        if path.exists() and not path.is_dir():
            raise UserError(f"--output {options.output}: is a file; expected a directory")
        if not path.absolute().parent.is_dir():
            raise UserError(f"--output {options.output}: its parent directory does not exist")


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if not entries or not all(entry.isdecimal() for entry in entries):
        raise UserError(f"{option} {text}: expected whole numbers such as 0,1,2")
    return tuple(sorted({int(entry) for entry in entries}))
