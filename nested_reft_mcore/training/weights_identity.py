"""Which weights a model directory holds, without reading all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from nested_reft_mcore.checkpoints.manifest import MANIFEST_FILE, read_manifest
from nested_reft_mcore.config.checkpoint_layout import resolve_checkpoint
from nested_reft_mcore.config.schema import ModelConfig

_BLOCKS = 32
"""Of a file; an update of a model changes every one of them."""
_BLOCK_BYTES = 1 << 16


def weights_identity(model: ModelConfig, seed: int) -> dict[str, Any]:
    """Equal for equal weights, wherever they lie; JSON values.

    A checkpoint's is the checksum of its manifest, which has those of all files. A Hugging Face
    directory's is that of `config.json`, of the sizes of the weight files and of blocks spread over
    them: a file changed between the blocks alone would not be noticed.

    Raises:
        UserError: the checkpoint is missing or unfinished.
    """
    if model.checkpoint is not None:
        directory = resolve_checkpoint(model.checkpoint)
        step = read_manifest(directory).step
        digest = hashlib.sha256((directory / MANIFEST_FILE).read_bytes())
        return {"kind": "checkpoint", "step": step, "fingerprint": digest.hexdigest()[:16]}
    if model.hf_path is not None:
        return {"kind": "hf", "fingerprint": _fingerprint(Path(model.hf_path))}
    return {"kind": "fresh", "seed": seed}


def _fingerprint(directory: Path) -> str:
    digest = hashlib.sha256((directory / "config.json").read_bytes())
    for path in sorted(directory.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(f"{path.name} {size}".encode())
        with path.open("rb") as file:
            for block in range(_BLOCKS + 1):
                file.seek(max(0, size - _BLOCK_BYTES) * block // _BLOCKS)
                digest.update(file.read(_BLOCK_BYTES))
    return digest.hexdigest()[:16]
