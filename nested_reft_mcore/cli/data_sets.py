"""What the commands of `nested-reft data` do, once their options are read."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from nested_reft_mcore.config.data import (
    DataConfig,
    check_data,
    eval_sources,
    parse_source,
    train_sources,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import load_config, parse_override, section_from_dict
from nested_reft_mcore.launch.exit_codes import ExitCode


def run_check(
    config: Path | None,
    overrides: Sequence[str],
    train: Sequence[str],
    held_out: Sequence[str],
    tokenizer: Path | None,
    strict: bool,
    as_json: bool,
) -> int:
    """Say what data sets hold; returns the exit code. Raises UserError."""
    data = _with_sources(_data_config(config, overrides), train, held_out)
    trained, evaluated = train_sources(data), eval_sources(data)
    if not trained and not evaluated:
        raise UserError("nothing to check; expected --config FILE, --train or --eval NAME=PATH")
    from nested_reft_mcore.data.check import check_data_sets
    from nested_reft_mcore.data.tokenizers import load_tokenizer

    where = tokenizer or data.tokenizer_path
    loaded = None if where is None else load_tokenizer(where)
    report = check_data_sets(trained, evaluated, data, loaded)
    print(json.dumps(report.to_json(), indent=2) if as_json else report.text(), flush=True)
    is_fine = not report.refusals and (report.is_clean or not strict)
    return ExitCode.OK if is_fine else ExitCode.FAILURE


def run_math12k(train: str, test: str, math500: str, output: str) -> int:
    """Write Math12k; returns the exit code. Raises UserError."""
    from nested_reft_mcore.data.math12k import write_math12k

    written, left_out = write_math12k(train, test, math500, output)
    print(f"{output}: {written} rows; {left_out} left out, for MATH-500 asks them")
    return ExitCode.OK


def _data_config(path: Path | None, overrides: Sequence[str]) -> DataConfig:
    """The `data` section of a file, or of overrides alone."""
    if path is not None:
        config = load_config(path, overrides)
        model = config.model.hf_path
        known = config.data.tokenizer_path or model
        return config.data.model_copy(update={"tokenizer_path": known})
    values = {}
    for override in overrides:
        key, value = parse_override(override)
        section, _, name = key.partition(".")
        if section != "data" or not name or "." in name:
            raise UserError(f"override {override!r}: expected data.field=value")
        values[name] = value
    return section_from_dict(DataConfig, values, "command line")


def _with_sources(data: DataConfig, train: Sequence[str], held_out: Sequence[str]) -> DataConfig:
    """The section with the sources of the command line in place of its own."""
    changes = {}
    if train:
        changes |= {"train_path": None, "train": tuple(map(parse_source, train))}
    if held_out:
        changes |= {"eval_path": None, "eval": tuple(map(parse_source, held_out))}
    data = data.model_copy(update=changes)
    check_data(data)
    return data
