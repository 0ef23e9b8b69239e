"""Data sets of the Hugging Face hub, through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.data import DataSource
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.records import OnBroken, Record
from nested_reft_mcore.data.tables import numbered

_PATIENCE_SECONDS = 10.0


def read_hub(source: DataSource, on_broken: OnBroken) -> Iterator[Record]:
    """Rows of a data set, by its name or by a directory that `datasets` reads or has saved.

    Nothing of the data set is run. With `HF_HUB_OFFLINE=1` it comes from the cache. Places are
    counted from 1: `openai/gsm8k:main@test:row 5`.

    Raises:
        UserError: `datasets` is missing, or there is no such data set, subset or split.
    """
    yield from numbered(source.place, _load(source), on_broken)


def _load(source: DataSource) -> Any:
    assert source.hub is not None, "checked when the configuration was read"
    try:
        import datasets
    except ImportError as error:
        raise UserError(
            f"{source.place}: data sets of the hub need `datasets`, which is not installed: pip "
            "install 'nested_reft_mcore[hub]'"
        ) from error
    if not Path(source.hub).exists():
        _check_hub(source)
    try:
        if _was_saved(Path(source.hub)):
            found = datasets.load_from_disk(source.hub)
            return found[source.split] if isinstance(found, datasets.DatasetDict) else found
        return datasets.load_dataset(source.hub, source.subset, split=source.split)
    except KeyError as error:
        raise UserError(f"{source.place}: no split {error}") from error
    except Exception as error:  # datasets, its readers and the network raise what they like
        lines = [line for line in str(error).splitlines() if line.strip()]
        reason = lines[0] if lines else type(error).__name__
        raise UserError(f"{source.place}: cannot be loaded by `datasets`: {reason}") from error


def _check_hub(source: DataSource) -> None:
    """Ask once whether there is a hub: `datasets` asks for half a minute, and says little.

    Raises:
        UserError: nobody answers, and the cache was not asked for.
    """
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    if constants.HF_HUB_OFFLINE:
        return
    try:
        get_session().head(constants.ENDPOINT, timeout=_PATIENCE_SECONDS)
    except Exception as error:  # whatever the network's libraries raise
        raise UserError(
            f"{source.place}: {constants.ENDPOINT} cannot be reached ({error}); HF_HUB_OFFLINE=1 "
            "takes what was downloaded before; or give the data as files"
        ) from error


def _was_saved(directory: Path) -> bool:
    """Whether `datasets` wrote this directory by `save_to_disk`."""
    names = ("dataset_dict.json", "state.json")
    return any((directory / name).is_file() for name in names)
