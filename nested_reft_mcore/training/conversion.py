"""A Hugging Face directory becomes a checkpoint, and back: what `convert` and the tools do."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

from nested_reft_mcore.checkpoints.manifest import file_names, hash_files, write_manifest
from nested_reft_mcore.checkpoints.publish import sync_tree
from nested_reft_mcore.checkpoints.staging import (
    check_output_is_free,
    check_room,
)
from nested_reft_mcore.config.checkpoint_layout import (
    ARCHITECTURE_FILE,
    read_checkpoint_architecture,
    resolve_checkpoint,
)
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.inference import HfToMcoreOptions, McoreToHfOptions
from nested_reft_mcore.hf.config import check_exportable, read_architecture
from nested_reft_mcore.hf.directory_writer import plan_shards
from nested_reft_mcore.hf.families import weight_map
from nested_reft_mcore.hf.safetensors_reader import SafetensorsReader
from nested_reft_mcore.hf.tensor_checks import check_tensors, some
from nested_reft_mcore.hf.tokenizer_files import (
    CHECKPOINT_TOKENIZER_DIRECTORY,
    checkpoint_tokenizer,
    copy_tokenizer_files,
    has_tokenizer,
)
from nested_reft_mcore.hf.weight_map import WeightMap
from nested_reft_mcore.launch.context import ParallelContext
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.mcore.agreement import write_together
from nested_reft_mcore.mcore.checkpoint import check_files
from nested_reft_mcore.mcore.checkpoint_pieces import checkpoint_key
from nested_reft_mcore.mcore.convert import (
    WrittenShare,
    check_checkpoint,
    checkpoint_bytes,
    finish_checkpoint,
    write_hf_files,
    write_share,
)
from nested_reft_mcore.mcore.hf_weights import write_configs
from nested_reft_mcore.mcore.piece_reader import PieceReader
from nested_reft_mcore.observability.byte_progress import ByteProgress
from nested_reft_mcore.training.verification import verify

_log = logging.getLogger(__name__)


def hf_to_mcore(options: HfToMcoreOptions, context: ParallelContext) -> int:
    """Write the model of a Hugging Face directory as a checkpoint. Every process calls it.

    The checkpoint loads at any parallel layout. The tokenizer, if there is one, goes with it.

    Returns:
        The exit code: 1 if the logits were to be verified and differ.

    Raises:
        UserError: the directory cannot be read, its tensors are not the architecture's or not
            finite, or the output cannot be written.
    """
    hf_dir, output = Path(options.hf), Path(options.output).resolve()
    tensor_size = options.parallel.tensor_model_parallel_size
    architecture = read_architecture(hf_dir)
    mapping = weight_map(architecture)
    with SafetensorsReader(hf_dir) as reader:
        check_tensors(reader, mapping, architecture, hf_dir)
        dtype = _written_dtype(options.dtype, {reader.dtype(name) for name in mapping.hf_shapes})
        num_bytes = checkpoint_bytes(mapping, architecture, tensor_size, dtype)

        def check() -> None:
            check_output_is_free(
                output, marker=ARCHITECTURE_FILE, kind="checkpoints", force=options.force
            )
            check_room(output, num_bytes)

        def write(directory: Path) -> WrittenShare:
            with _progress(num_bytes, context) as progress:
                return write_share(
                    directory,
                    reader,
                    mapping,
                    architecture,
                    dtype=dtype,
                    tensor_size=tensor_size,
                    rank=context.rank,
                    world_size=context.world_size,
                    progress=progress.advance,
                )

        def finish(directory: Path, shares: list[WrittenShare]) -> None:
            _judge_nonfinite(shares, hf_dir, allowed=options.allow_nonfinite)
            finish_checkpoint(
                directory, shares, mapping, architecture, dtype=dtype, tensor_size=tensor_size
            )
            _add_tokenizer_and_manifest(directory, hf_dir, shares)

        write_together(output, context, check=check, write=write, finish=finish)
    if context.is_main:
        print(f"{output}: checkpoint of {hf_dir}, {_in_words(mapping, dtype)}", flush=True)
    if not options.verify:
        return ExitCode.OK
    return verify(
        output, hf_dir, options.parallel, context, dtype=dtype, tolerance=options.tolerance
    )


def mcore_to_hf(options: McoreToHfOptions, context: ParallelContext) -> int:
    """Write the model of a checkpoint as a Hugging Face directory. Every process calls it.

    Returns:
        The exit code: 1 if the logits were to be verified and differ.

    Raises:
        UserError: the checkpoint cannot be read, its architecture has no Hugging Face layout, or
            the output cannot be written.
    """
    checkpoint, output = resolve_checkpoint(options.checkpoint), Path(options.output).resolve()
    # To verify against a damaged checkpoint would prove nothing.
    check_files(checkpoint, "checksums" if options.verify else "sizes", context)
    architecture = read_checkpoint_architecture(checkpoint)
    check_exportable(architecture)
    mapping = weight_map(architecture)
    tokenizer = _tokenizer_of(options, checkpoint)
    with PieceReader(checkpoint) as reader:
        check_checkpoint(reader, mapping, architecture)
        found = {reader.dtypes[checkpoint_key(entry)] for entry in mapping.entries}
        dtype = _written_dtype(options.dtype, found)
        plan = plan_shards(
            mapping.hf_shapes, dtype, options.max_shard_bytes, num_writers=context.world_size
        )

        def check() -> None:
            check_output_is_free(
                output, marker="config.json", kind="Hugging Face directories", force=options.force
            )
            check_room(output, plan.num_bytes)

        def write(directory: Path) -> None:
            if context.is_main:
                write_configs(directory, architecture, dtype, tokenizer)
            files = plan.files_of(context.rank, context.world_size)
            with _progress(plan.num_bytes, context) as progress:
                write_hf_files(
                    directory, files, plan, reader, mapping, architecture, progress.advance
                )

        write_together(
            output,
            context,
            check=check,
            write=write,
            finish=lambda directory, _: plan.finish(directory),
        )
    if context.is_main:
        with_tokenizer = "with" if tokenizer is not None else "without"
        print(
            f"{output}: Hugging Face model of {checkpoint}, {_in_words(mapping, dtype)}, "
            f"{with_tokenizer} tokenizer",
            flush=True,
        )
    if not options.verify:
        return ExitCode.OK
    return verify(
        checkpoint, output, options.parallel, context, dtype=dtype, tolerance=options.tolerance
    )


def _progress(num_bytes: int, context: ParallelContext) -> ByteProgress:
    """Shown by the first process, of its own share: the others' are as large."""
    return ByteProgress("convert", num_bytes // context.world_size, context.is_main)


def _written_dtype(asked: str, found: set[torch.dtype]) -> torch.dtype:
    """What is asked for; else bfloat16 where all of it is, and float32, which holds any other."""
    if asked == "auto":
        return torch.bfloat16 if found == {torch.bfloat16} else torch.float32
    return torch.bfloat16 if asked == "bfloat16" else torch.float32


def _judge_nonfinite(shares: list[WrittenShare], hf_dir: Path, *, allowed: bool) -> None:
    names = sorted({name for share in shares for name in share.nonfinite})
    if not names:
        return
    message = f"{hf_dir}: NaN or infinity in {some('', names).rstrip('; ')}"
    if not allowed:
        raise UserError(f"{message}; write them all the same with --allow-nonfinite")
    _log.warning("%s", message)


def _add_tokenizer_and_manifest(directory: Path, hf_dir: Path, shares: list[WrittenShare]) -> None:
    if has_tokenizer(hf_dir):
        (directory / CHECKPOINT_TOKENIZER_DIRECTORY).mkdir()
        copy_tokenizer_files(hf_dir, directory / CHECKPOINT_TOKENIZER_DIRECTORY)
    hashed = [entry for share in shares for entry in share.files]
    rest = set(file_names(directory)) - {entry.name for entry in hashed}
    sync_tree(directory)
    write_manifest(directory, [*hashed, *hash_files(directory, sorted(rest))])


def _tokenizer_of(options: McoreToHfOptions, checkpoint: Path) -> Path | None:
    if options.tokenizer_path is not None:
        return Path(options.tokenizer_path)
    return checkpoint_tokenizer(checkpoint)


def _in_words(mapping: WeightMap, dtype: torch.dtype) -> str:
    count = sum(torch.Size(shape).numel() for shape in mapping.hf_shapes.values())
    return f"{count:,} parameters in {str(dtype).removeprefix('torch.')}"
