"""Whether the tensors of a Hugging Face directory are those that its architecture has."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.hf.safetensors_reader import SafetensorsReader
from nested_reft_mcore.hf.weight_map import WeightMap

# Buffers that old checkpoints hold and every implementation computes.
_IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)
_SHOWN = 5


def check_tensors(
    reader: SafetensorsReader, mapping: WeightMap, architecture: ModelArchitecture, hf_dir: Path
) -> None:
    """Compare names and shapes, which costs reading the files' headers.

    Raises:
        UserError: names the tensors that are missing, unexpected or of another shape.
    """
    missing = [name for name in mapping.hf_shapes if name not in reader.names]
    unexpected = set(reader.names - mapping.hf_shapes.keys())
    if not architecture.untie_embeddings_and_output_weights:
        # Written by some tools beside the embedding that it is tied to.
        unexpected.discard("lm_head.weight")
    unexpected = sorted(name for name in unexpected if not name.endswith(_IGNORED_SUFFIXES))
    if missing or unexpected:
        raise UserError(
            f"{hf_dir}: its tensors are not those that its architecture has: "
            f"{some('missing: ', missing)}{some('unexpected: ', unexpected)}"
        )
    for name, expected in mapping.hf_shapes.items():
        found = reader.shape(name)
        if found != expected:
            raise UserError(
                f"{hf_dir}: {name} has shape {list(found)}, the architecture has {list(expected)}"
            )


def some(label: str, names: Iterable[str]) -> str:
    """The first few of `names` under a label, or nothing where there are none."""
    names = list(names)
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{label}{', '.join(names[:_SHOWN])}{more}; "
