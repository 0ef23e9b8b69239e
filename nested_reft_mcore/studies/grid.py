"""From a study file to its runs: each once, in the order in which they are to be run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.checks import check_architecture, check_batches, check_depth
from nested_reft_mcore.config.data import data_paths
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.layout import check_layout
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.config.nested import num_skipped
from nested_reft_mcore.config.schema import Config
from nested_reft_mcore.hf.config import model_architecture, model_source
from nested_reft_mcore.studies.schema import LayoutSection, SizeSection, StudyFile, words_of

_SEPARATORS = ("\t", "\n")


@dataclass(frozen=True)
class Point:
    """Where a run stands on the axes of its study."""

    size: str
    skip_ratio: float
    law: str | None
    """None where it makes no difference: nothing is skipped."""
    correction: str | None
    """None where it makes no difference: nothing is skipped."""
    tp: int
    pp: int
    dp: int
    variant: str | None
    """What tells layouts of equal sizes apart."""
    seed: int

    @property
    def world_size(self) -> int:
        """Processes, one on each GPU."""
        return self.tp * self.pp * self.dp

    @property
    def layout(self) -> str:
        """Such as `tp1_pp2_dp1`."""
        sizes = f"tp{self.tp}_pp{self.pp}_dp{self.dp}"
        return sizes if self.variant is None else f"{sizes}_{self.variant}"

    @property
    def name(self) -> str:
        """Of the run, and of its directory below the study's."""
        parts = [self.size, f"skip_{self.skip_ratio:g}", self.law, self.correction, self.layout]
        return ".".join([*(part for part in parts if part is not None), f"seed_{self.seed}"])

    def at_full_depth(self) -> Point:
        """The run that this one is compared with."""
        return replace(self, skip_ratio=0.0, law=None, correction=None)


@dataclass(frozen=True)
class StudyRun:
    """One `nested-reft train`."""

    point: Point
    config_path: Path
    words: tuple[str, ...]
    """Options after the configuration file, as on a command line."""
    config: Config
    """What they resolve to; the shape of a missing model directory is the base's own."""
    architecture: ModelArchitecture
    missing: str | None = None
    """A model's directory that is not there yet."""

    @property
    def name(self) -> str:
        """Also its directory below the study's."""
        return self.point.name

    @property
    def directory(self) -> Path:
        """The run directory."""
        return Path(self.config.run_dir)

    @property
    def num_steps(self) -> int:
        """Steps of the whole run."""
        return self.config.train.num_steps

    @property
    def most_tokens(self) -> int:
        """Tokens that the whole run generates if every completion is as long as it may be."""
        return self.num_steps * tokens_per_step(self.config)

    @property
    def num_updates(self) -> int:
        """Optimizer steps of the whole run."""
        return self.num_steps * self.config.train.updates_per_step


@dataclass(frozen=True)
class Grid:
    """All runs of a study."""

    study: StudyFile
    path: Path
    runs: tuple[StudyRun, ...]
    """Seed by seed, then size by size, so that a machine that drifts looks like no law."""
    struck: tuple[tuple[str, str], ...]
    """Points whose layout does not suit the model, and why, in the order of the runs."""
    num_merged: int
    """Points that another run stands for."""
    num_excluded: int
    """Points that `exclude` leaves out."""

    @property
    def output(self) -> Path:
        """Directory of the runs."""
        return Path(self.study.output)


def tokens_per_step(config: Config) -> int:
    """Tokens of a step's completions if each is as long as it may be."""
    rollout = config.rollout
    return rollout.prompts_per_step * rollout.group_size * rollout.max_new_tokens


def make_grid(study: StudyFile, path: Path) -> Grid:
    """All runs of the study at `path`.

    Raises:
        UserError: an option that does not exist or contradicts another; unequal runs of a size; a
            layout that does not suit a model, with `on_misfit: error`.
    """
    _check_layouts(study, path)
    runs: dict[str, StudyRun] = {}
    reasons: dict[str, str] = {}
    merged = excluded = 0
    seen: set[tuple[Any, ...]] = set()
    for size_name, size, layout, point in _points(study):
        if _is_excluded(study, point):
            excluded += 1
            continue
        point = _merged(point, study)
        if point.name in runs or point.name in reasons:
            merged += 1
            continue
        try:
            run = _make_run(study, path, size, layout, point)
        except _Misfit as misfit:
            if study.on_misfit == "error":
                raise UserError(f"{path}: {point.name}: {misfit}") from None
            reasons[point.name] = str(misfit)
            continue
        # Ratios that round to one number of layers are one policy.
        count = num_skipped(run.config.nested, run.architecture.num_layers)
        same = (size_name, count, *list(asdict(run.point).values())[2:])
        is_full = count == 0 and point.skip_ratio > 0 and point.at_full_depth().name in runs
        if is_full or same in seen:
            merged += 1
            continue
        seen.add(same)
        runs[point.name] = run
    if not runs:
        raise UserError(f"{path}: no run is left of the grid; {_first_reason(reasons, excluded)}")
    _check_equal(study, path, tuple(runs.values()))
    return Grid(study, path, tuple(runs.values()), tuple(reasons.items()), merged, excluded)


class _Misfit(Exception):
    """A layout that cannot divide a model, or a ratio that it has too few layers for."""


def _first_reason(reasons: Mapping[str, str], excluded: int) -> str:
    if reasons:
        name, reason = next(iter(reasons.items()))
        return f"such as {name}: {reason}"
    return f"`exclude` leaves out all {excluded} points"


def _points(study: StudyFile) -> Iterator[tuple[str, SizeSection, LayoutSection, Point]]:
    for seed in study.seeds:
        for name, size in study.sizes.items():
            layouts = size.layouts if size.layouts is not None else study.layouts
            axes = (layouts, sorted(study.skip_ratios), study.laws, study.corrections)
            for layout, ratio, law, correction in product(*axes):
                dp = _replicas(study, name, layout)
                sizes = (layout.tp, layout.pp, dp, layout.variant)
                yield name, size, layout, Point(name, ratio, law, correction, *sizes, seed)


def _check_layouts(study: StudyFile, path: Path) -> None:
    """Runs of two layouts with one name would be taken for one run."""
    for name, size in study.sizes.items():
        seen = set()
        for layout in size.layouts if size.layouts is not None else study.layouts:
            sizes = (layout.tp, layout.pp, _replicas(study, name, layout), layout.variant)
            if sizes in seen:
                raise UserError(
                    f"{path}: layouts of size {name}: tp={sizes[0]}, pp={sizes[1]}, dp={sizes[2]} "
                    "is named twice; expected it once, or a `variant` that tells them apart"
                )
            seen.add(sizes)


def missing_data(runs: Iterable[StudyRun]) -> list[str]:
    """Files of the runs' data that are not there, seen from here; each once, in order."""
    named = {path for run in runs for _, path in data_paths(run.config.data)}
    return sorted(path for path in named if not Path(path).exists())


def _replicas(study: StudyFile, size: str, layout: LayoutSection) -> int:
    if layout.nodes is None:
        return layout.dp or 1
    world, replica = layout.nodes * study.cluster.gpus_per_node, layout.tp * layout.pp
    if world % replica:
        raise UserError(
            f"layout of size {size}: tp={layout.tp} * pp={layout.pp} = {replica} does not divide "
            f"nodes={layout.nodes} x cluster.gpus_per_node={study.cluster.gpus_per_node} = {world}"
        )
    if layout.dp not in (None, world // replica):
        raise UserError(
            f"layout of size {size}: dp={layout.dp}, but nodes={layout.nodes} make "
            f"{world // replica} replicas; set one of them"
        )
    return world // replica


def _merged(point: Point, study: StudyFile) -> Point:
    """The point that stands for all that make the same run."""
    if point.skip_ratio == 0:
        return point.at_full_depth()
    # With one stage a balanced plan is a uniform one.
    return replace(point, law=study.laws[0]) if point.pp == 1 else point


def _is_excluded(study: StudyFile, point: Point) -> bool:
    values = asdict(point)

    def holds(axis: str, wanted: Any) -> bool:
        return values[axis] in (wanted if isinstance(wanted, list) else [wanted])

    return any(all(holds(*item) for item in rule.items()) for rule in study.exclude)


def _make_run(
    study: StudyFile, path: Path, size: SizeSection, layout: LayoutSection, point: Point
) -> StudyRun:
    base = path.parent / (size.base or study.base)
    own = {**study.overrides, **size.overrides, **layout.overrides}
    grid = {
        "run_dir": str(Path(study.output) / point.name),
        "seed": point.seed,
        "nested.skip_ratio": point.skip_ratio,
        "nested.num_skipped": None,
        "nested.law": point.law or study.laws[0],
        "algorithm.rollout_is": point.correction or study.corrections[0],
        "parallel.tensor_model_parallel_size": point.tp,
        "parallel.pipeline_model_parallel_size": point.pp,
        "parallel.data_parallel_size": point.dp,
    }
    model = _model_options(size)
    missing = size.hf or size.checkpoint
    if missing is not None and Path(missing).exists():
        missing = None
    options = {**own, **model, **grid}
    planned = {**own, **({} if missing else model), **grid}
    config = _load(base, planned, point)
    budget = size.budget or study.budget
    if budget is not None:
        steps = _steps_of(study, path, point, config, budget)
        options["train.num_steps"] = steps
        train = config.train.model_copy(update={"num_steps": steps})
        config = config.model_copy(update={"train": train})
    words = words_of(options)
    for word in words:
        if any(sign in word for sign in _SEPARATORS):
            raise UserError(f"{path}: {word!r}: a tab or a line break cannot be in an option")
    architecture = model_architecture(config.model)
    _check_fits(config, architecture, point)
    return StudyRun(point, base, tuple(words), config, architecture, missing)


def _load(base: Path, options: Mapping[str, Any], point: Point) -> Config:
    """A point's configuration; _Misfit where it would do at full depth."""
    try:
        return load_config(base, words_of(options))
    except UserError as error:
        if point.skip_ratio > 0:
            load_config(base, words_of({**options, "nested.skip_ratio": 0.0}))
            raise _Misfit(str(error)) from None
        raise


def _model_options(size: SizeSection) -> dict[str, Any]:
    """What `--hf` and `--checkpoint` stand for."""
    if size.hf is None and size.checkpoint is None:
        return {}
    return {
        "model.hf_path": size.hf,
        "model.checkpoint": size.checkpoint,
        "model.architecture": None,
    }


def _steps_of(study: StudyFile, path: Path, point: Point, config: Config, budget: int) -> int:
    """Steps that make the budget, exactly: rounding would make runs unequal."""
    if study.equal == "tokens":
        unit, what = tokens_per_step(config), "tokens a step (prompts x group x longest completion)"
    else:
        unit, what = config.train.updates_per_step, "updates a step"
    if budget % unit:
        near = [n * unit for n in (budget // unit, budget // unit + 1) if n]
        raise UserError(
            f"{path}: budget: {budget:,} {study.equal} are no whole number of steps of "
            f"{point.name}, which has {unit:,} {what}; what would fit: "
            f"{' or '.join(f'{n:,}' for n in near)}"
        )
    return budget // unit


def _check_fits(config: Config, architecture: ModelArchitecture, point: Point) -> None:
    """Raises _Misfit where the layout is to blame, or a ratio that leaves too few layers."""
    check_architecture(architecture, model_source(config.model))
    try:
        check_depth(config, architecture.num_layers)
        check_layout(architecture, config.parallel, point.world_size)
        check_batches(config, point.dp)
    except UserError as error:
        raise _Misfit(str(error)) from None


def _check_equal(study: StudyFile, path: Path, runs: tuple[StudyRun, ...]) -> None:
    """Without a budget the options themselves have to make runs of a size equal."""
    first: dict[str, StudyRun] = {}
    for run in runs:
        other = first.setdefault(run.point.size, run)
        if study.equal == "tokens":
            found, wanted = run.most_tokens, other.most_tokens
        else:
            found, wanted = run.num_updates, other.num_updates
        if found != wanted:
            raise UserError(
                f"{path}: equal: {study.equal}: {run.name} makes {found:,} {study.equal} and "
                f"{other.name} {wanted:,}; set `budget`, or options that make them equal"
            )
