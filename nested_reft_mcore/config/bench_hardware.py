"""Options of `nested-reft bench hardware`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, cast, get_args

from pydantic import Field

from nested_reft_mcore.config.base import Section
from nested_reft_mcore.config.errors import UserError

DtypeName = Literal["float32", "bfloat16"]
_QUICK_ROUNDS = 2


class BenchHardwareOptions(Section):
    """`nested-reft bench hardware`: rates of this machine, for `plan` and `simulate`."""

    nproc: int | None = Field(default=None, gt=0)
    """Processes; left out: one for each GPU, or two on a machine without."""
    output: str | None = None
    """YAML file for the profile that `--hardware` reads."""
    json_file: str | None = None
    """JSON file for every number, with machine and commit."""
    dtypes: str = "auto"
    """Types of numbers to multiply; `auto`: float32, and bfloat16 on a GPU."""
    rounds: int = Field(default=5, gt=0)
    """Of each measurement; medians and the spread are reported."""
    quick: bool = False
    """Tiny sizes and two rounds, which show that it works and measure little."""

    @property
    def num_rounds(self) -> int:
        """Rounds that are run."""
        return min(self.rounds, _QUICK_ROUNDS) if self.quick else self.rounds

    def dtype_names(self, device: str) -> tuple[DtypeName, ...]:
        """`dtypes` as names, on a `cpu` or `cuda`. UserError for an unknown one, or none."""
        if self.dtypes == "auto":
            return ("float32", "bfloat16") if device == "cuda" else ("float32",)
        found = dict.fromkeys(name.strip() for name in self.dtypes.split(",") if name.strip())
        known = get_args(DtypeName)
        if not found or not set(found) <= set(known):
            raise UserError(f"--dtypes {self.dtypes}: expected auto, or some of {', '.join(known)}")
        return cast(tuple[DtypeName, ...], tuple(found))


def check_bench_hardware(options: BenchHardwareOptions) -> None:
    """Refuse what cannot be written or read, before anything is measured.

    Raises:
        UserError: names the option, what it says and what was expected.
    """
    options.dtype_names("cpu")
    if options.output is not None and Path(options.output).suffix not in (".yaml", ".yml"):
        raise UserError(
            f"--output {options.output}: expected a name that ends in .yaml or .yml, as "
            "`plan --hardware` reads it"
        )
    for name, path in (("--output", options.output), ("--json", options.json_file)):
        if path is not None and not Path(path).absolute().parent.is_dir():
            raise UserError(f"{name} {path}: its directory does not exist")
