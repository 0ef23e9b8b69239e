"""A Hugging Face directory becomes a checkpoint, and back: what `convert` and the tools do."""

from __future__ import annotations

from pathlib import Path

from nested_reft_mcore.config.checkpoint_layout import (
    ARCHITECTURE_FILE,
    read_checkpoint_architecture,
    resolve_checkpoint,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.inference import HfToMcoreOptions, McoreToHfOptions
from nested_reft_mcore.config.schema import ModelConfig
from nested_reft_mcore.hf.config import check_exportable, read_architecture
from nested_reft_mcore.hf.directory_writer import check_output_is_free
from nested_reft_mcore.hf.tokenizer_files import (
    CHECKPOINT_TOKENIZER_DIRECTORY,
    checkpoint_tokenizer,
    copy_tokenizer_files,
    has_tokenizer,
)
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.mcore.checkpoint import load_weights, save_weights
from nested_reft_mcore.mcore.hf_weights import export_hf_weights, load_hf_weights
from nested_reft_mcore.mcore.model import build_policy

_BYTES_IN_MEGABYTE = 10**6


def hf_to_mcore(options: HfToMcoreOptions, context: ParallelContext) -> None:
    """Write the model of a Hugging Face directory as a checkpoint. Every process calls it.

    The checkpoint loads at any parallel layout. The tokenizer, if there is one, goes with it.

    Raises:
        UserError: the directory cannot be read, or the output is taken.
    """
    hf_dir, output = Path(options.hf), Path(options.output).resolve()
    _check_checkpoint_is_free(output, force=options.force)
    architecture = read_architecture(hf_dir)
    model = ModelConfig(hf_path=options.hf, dtype=options.dtype)
    policy = build_policy(architecture, model, options.parallel, context)
    load_hf_weights(policy, hf_dir)

    def add_tokenizer(directory: Path) -> None:
        if has_tokenizer(hf_dir):
            target = directory / CHECKPOINT_TOKENIZER_DIRECTORY
            target.mkdir()
            copy_tokenizer_files(hf_dir, target)

    save_weights(policy, output, add_files=add_tokenizer)
    if context.is_main:
        print(f"{output}: checkpoint of {hf_dir}", flush=True)


def mcore_to_hf(options: McoreToHfOptions, context: ParallelContext) -> None:
    """Write the model of a checkpoint as a Hugging Face directory. Every process calls it.

    Raises:
        UserError: the checkpoint cannot be read, its architecture has no Hugging Face layout, or
            the output is taken.
    """
    checkpoint, output = resolve_checkpoint(options.checkpoint), Path(options.output)
    check_output_is_free(output, force=options.force)
    architecture = read_checkpoint_architecture(checkpoint)
    check_exportable(architecture)
    if options.tokenizer_path is None:
        tokenizer = checkpoint_tokenizer(checkpoint)
    else:
        tokenizer = Path(options.tokenizer_path)
    model = ModelConfig(checkpoint=str(checkpoint), dtype=options.dtype)
    policy = build_policy(architecture, model, options.parallel, context)
    load_weights(policy, checkpoint)
    export_hf_weights(
        policy,
        output,
        tokenizer,
        max_shard_bytes=options.max_shard_size_mb * _BYTES_IN_MEGABYTE,
        force=options.force,
    )
    if context.is_main:
        with_tokenizer = "with" if tokenizer is not None else "without"
        print(
            f"{output}: Hugging Face model of {checkpoint}, {with_tokenizer} tokenizer", flush=True
        )


def _check_checkpoint_is_free(output: Path, *, force: bool) -> None:
    """Refuse to write over anything, and with `force` over anything but a checkpoint."""
    if not output.exists():
        return
    if not output.is_dir():
        raise UserError(f"{output}: expected a directory to write to, found a file")
    if not any(output.iterdir()):
        return
    if not force:
        raise UserError(f"{output}: is not empty; choose another directory or use --force")
    if not (output / ARCHITECTURE_FILE).is_file():
        raise UserError(
            f"{output}: --force replaces checkpoints only, and this one has no {ARCHITECTURE_FILE}"
        )
