"""What a study file says: the axes of its grid, and what to leave out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from nested_reft_mcore.config.base import Section
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import section_from_dict
from nested_reft_mcore.config.schema import Correction
from nested_reft_mcore.config.yaml_reader import read_yaml

NAME = "^[A-Za-z0-9][A-Za-z0-9_.+-]*$"
"""Names that become part of a run directory's."""

Ratio = Annotated[float, Field(ge=0, lt=1)]
Law = Literal["uniform", "stage_balanced"]
AXES = ("size", "skip_ratio", "law", "correction", "tp", "pp", "dp", "variant", "seed")
"""What tells two runs of a study apart, and what a rule of `exclude` may name."""
_OWN_KEYS = {
    "run_dir": "output",
    "seed": "seeds",
    "nested.skip_ratio": "skip_ratios",
    "nested.num_skipped": "skip_ratios",
    "nested.law": "laws",
    "algorithm.rollout_is": "corrections",
    "parallel.tensor_model_parallel_size": "layouts",
    "parallel.pipeline_model_parallel_size": "layouts",
    "parallel.data_parallel_size": "layouts",
    "model.hf_path": "sizes.NAME.hf",
    "model.checkpoint": "sizes.NAME.checkpoint",
}
"""Options that the grid sets, and where a study says them."""


class ClusterSection(Section):
    """The machines that runs are planned for."""

    nodes: int = Field(default=1, gt=0)
    """Machines that one run may have at most."""
    gpus_per_node: int = Field(default=8, gt=0)
    """GPUs of each, or processes on a machine without."""
    gpu_memory_gb: float | None = Field(default=None, gt=0)
    """Memory of each in 10^9 bytes; left out: the hardware's."""
    hardware: str = "h100"
    """A built-in profile, or a YAML file beside the study's."""
    assume: dict[str, float] = Field(default_factory=dict)
    """Assumptions of the profile that are replaced."""


class LayoutSection(Section):
    """How a run is spread over processes: by `dp`, or by `nodes`, or as one replica."""

    tp: int = Field(default=1, gt=0)
    """Tensor-parallel size."""
    pp: int = Field(default=1, gt=0)
    """Pipeline stages."""
    dp: int | None = Field(default=None, gt=0)
    """Replicas."""
    nodes: int | None = Field(default=None, gt=0)
    """Instead of `dp`: as many replicas as fill so many machines."""
    variant: str | None = Field(default=None, pattern=NAME)
    """Tells layouts of equal sizes apart, as one with more prompts for more GPUs."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Options of the runs with this layout."""


class SizeSection(Section):
    """One model size."""

    base: str | None = None
    """Configuration file of this size, instead of the study's; relative to the study file."""
    hf: str | None = None
    """Hugging Face directory, as of `--hf`; while missing, the base's shape is planned."""
    checkpoint: str | None = None
    """Checkpoint to start from, as of `--checkpoint`."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Options of this size, after the study's."""
    layouts: tuple[LayoutSection, ...] | None = None
    """Layouts of this size, instead of the study's."""
    budget: int | None = Field(default=None, gt=0)
    """Tokens or updates of each run of this size, instead of the study's."""


class StudyFile(Section):
    """A study: a grid over a base configuration."""

    name: str = Field(pattern=NAME)
    """What reports and jobs call it."""
    base: str
    """Configuration file, relative to this one."""
    output: str
    """Directory of the runs and of what is kept about them; relative as `run_dir` is."""
    equal: Literal["tokens", "updates"]
    """What all runs of a size have the same number of."""
    budget: int | None = Field(default=None, gt=0)
    """How many tokens (at most) or updates; sets train.num_steps. Left out: checked, not set."""
    overrides: dict[str, Any] = Field(default_factory=dict)
    """Options of all runs, as `section.field: value`."""
    sizes: dict[Annotated[str, Field(pattern=NAME)], SizeSection] = Field(min_length=1)
    """Model sizes by name."""
    skip_ratios: tuple[Ratio, ...] = Field(min_length=1)
    """Shares of layers that rollouts skip; others are compared with 0, full depth."""
    laws: tuple[Law, ...] = Field(default=("uniform",), min_length=1)
    """Which layers are skipped; the first one where it makes no difference."""
    corrections: tuple[Correction, ...] = Field(default=("practical",), min_length=1)
    """Values of `algorithm.rollout_is`; the first one where nothing is skipped."""
    layouts: tuple[LayoutSection, ...] = Field(default=(LayoutSection(),), min_length=1)
    """Parallel layouts."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = Field(default=(0,), min_length=1)
    """Seeds; all runs of a seed come before those of the next."""
    exclude: tuple[dict[str, Any], ...] = ()
    """Points to leave out: a rule holds where all of its axes have that value, or one of a list."""
    on_misfit: Literal["strike", "error"] = "strike"
    """A layout that cannot divide a model is left out and named, or is a mistake."""
    keep_checkpoints: bool = True
    """False: `run` and the array's tasks remove the checkpoints of runs that have finished."""
    cluster: ClusterSection = ClusterSection()
    """What `plan` plans for, and `submit` asks for."""


def load_study(path: Path) -> StudyFile:
    """Read a study file. With `extends: FILE` its keys replace those of a file beside it.

    Of `overrides` single options are replaced.

    Raises:
        UserError: whatever is wrong with it, with file, line and key.
    """
    data, sources = _read(path)
    study = section_from_dict(StudyFile, data, str(path), sources)
    for key, overrides in _all_overrides(study):
        _check_overrides(path, sources, key, overrides)
    for name, size in study.sizes.items():
        if size.hf is not None and size.checkpoint is not None:
            raise UserError(
                f"{path}: sizes.{name}: hf and checkpoint are both set; set one of them"
            )
    _check_twice(path, study)
    _check_exclude(path, study)
    return study


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """A file's keys over those of the file that it extends, and where each is set."""
    file = read_yaml(path)
    own = file.sources
    other = file.data.pop("extends", None)
    if other is None:
        return file.data, own
    if not isinstance(other, str) or Path(other).name != other:
        raise UserError(
            f"{own['extends']}: `extends`: {other!r}: expected the name of a file beside this one"
        )
    below = read_yaml(path.with_name(other))
    if "extends" in below.data:
        raise UserError(f"{below.path}: `extends`: {path} extends this file; expected one level")
    data = {**below.data, **file.data}
    one, more = below.data.get("overrides"), file.data.get("overrides")
    if isinstance(one, dict) and isinstance(more, dict):
        data["overrides"] = {**one, **more}
    return data, below.sources | own


def words_of(overrides: Mapping[str, Any]) -> list[str]:
    """Options as the command line takes them, `section.field=value`."""
    return [f"{key}={json.dumps(value)}" for key, value in overrides.items()]


def _all_overrides(study: StudyFile) -> list[tuple[str, dict[str, Any]]]:
    found = [("overrides", study.overrides)]
    found += [
        (f"layouts.{i}.overrides", layout.overrides) for i, layout in enumerate(study.layouts)
    ]
    for name, size in study.sizes.items():
        found.append((f"sizes.{name}.overrides", size.overrides))
        found += [
            (f"sizes.{name}.layouts.{i}.overrides", layout.overrides)
            for i, layout in enumerate(size.layouts or ())
        ]
    return found


def _check_overrides(
    path: Path, sources: Mapping[str, str], key: str, overrides: Mapping[str, Any]
) -> None:
    """Options that the grid sets would be overwritten silently."""
    for name in overrides:
        if name in _OWN_KEYS:
            where = sources.get(f"{key}.{name}", str(path))
            raise UserError(
                f"{where}: `{key}`: {name} is set by the grid; expected it in `{_OWN_KEYS[name]}`"
            )


def _check_twice(path: Path, study: StudyFile) -> None:
    for key in ("skip_ratios", "laws", "corrections", "seeds"):
        values = getattr(study, key)
        for value in values:
            if values.count(value) > 1:
                raise UserError(f"{path}: `{key}`: {value} is named twice; expected it once")


def _check_exclude(path: Path, study: StudyFile) -> None:
    for number, rule in enumerate(study.exclude):
        unknown = [key for key in rule if key not in AXES]
        if unknown or not rule:
            raise UserError(
                f"{path}: `exclude` {number + 1}: expected some of {', '.join(AXES)}, got "
                f"{unknown[0] if unknown else 'none of them'}"
            )
        sizes = rule.get("size", [])
        for size in sizes if isinstance(sizes, list) else [sizes]:
            if size not in study.sizes:
                raise UserError(
                    f"{path}: `exclude` {number + 1}: no size {size!r}; expected one of "
                    f"{', '.join(study.sizes)}"
                )
