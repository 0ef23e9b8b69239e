"""The index of a checkpoint is a pickle: only the classes of an index may be built from it."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from nested_reft_mcore.config.errors import UserError

INDEX_FILE = ".metadata"

# Plain records of torch's checkpoint format; building one runs no code of its own.
_RECORDS = {
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
    "torch": {
        "Size",
        "bfloat16",
        "bool",
        "float16",
        "float32",
        "float64",
        "int32",
        "int64",
        "uint8",
    },
}


def read_index(directory: Path) -> Metadata:
    """The index of a checkpoint, read by an unpickler that builds nothing else.

    torch reads `.metadata` with one that cannot be told to read data only; so whoever lets torch
    load a checkpoint reads its index with this first. All other files are read with `weights_only`.

    Raises:
        UserError: the index is missing or broken, or it asks for something foreign.
    """
    index = directory / INDEX_FILE
    if not index.is_file():
        raise UserError(f"{directory}: no {INDEX_FILE}; expected a complete checkpoint")
    try:
        with index.open("rb") as file:
            found = _IndexUnpickler(file).load()
    except UserError as error:
        raise UserError(f"{index}: {error}") from None
    # A broken pickle can raise nearly anything.
    except Exception as error:
        raise UserError(f"{index}: broken: {type(error).__name__}: {error}") from None
    if not isinstance(found, Metadata):
        raise UserError(
            f"{index}: expected the index of a checkpoint, found {type(found).__name__}"
        )
    return found


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _RECORDS.get(module, ()):
            raise UserError(f"would import {module}.{name}; expected the index of a checkpoint")
        return super().find_class(module, name)
