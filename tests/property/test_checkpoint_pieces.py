"""The pieces of a checkpoint tile its tensors, and lead back to the same bits, however cut."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from test_hf_maps import architectures

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.hf.directory_writer import plan_shards
from nested_reft_mcore.hf.families import weight_map
from nested_reft_mcore.hf.safetensors_reader import SafetensorsReader
from nested_reft_mcore.hf.transforms import padded_vocab_size, to_mcore, tp_slice
from nested_reft_mcore.hf.weight_map import WeightKind
from nested_reft_mcore.mcore import checkpoint_pieces
from nested_reft_mcore.mcore.checkpoint_pieces import (
    checkpoint_key,
    checkpoint_shapes,
    plan_pieces,
)
from nested_reft_mcore.mcore.convert import (
    check_checkpoint,
    finish_checkpoint,
    share_out,
    write_hf_files,
    write_share,
)
from nested_reft_mcore.mcore.piece_reader import PieceReader


def write_source(directory: Path, architecture, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in weight_map(architecture).hf_shapes.items()
    }
    save_file(tensors, directory / "model.safetensors")
    return tensors


@settings(max_examples=20, deadline=None)
@given(
    architectures(),
    st.integers(1, 3),
    st.sampled_from([200, 2**27]),
    st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_there_and_back_keeps_every_bit(case, world_size, max_piece_bytes, dtype):
    """For any architecture, tensor-parallel size, number of processes and size of pieces."""
    architecture, tp_size = case
    mapping = weight_map(architecture)
    with (
        tempfile.TemporaryDirectory() as name,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(checkpoint_pieces, "MAX_PIECE_BYTES", max_piece_bytes)
        # Nobody pulls the plug here, and a hundred waits for the disk take long.
        patch.setattr(os, "fsync", lambda _: None)
        room = Path(name)
        tensors = write_source(room, architecture, dtype)
        done: list[int] = []
        with SafetensorsReader(room) as source:
            shares = [
                write_share(
                    room,
                    source,
                    mapping,
                    architecture,
                    dtype=dtype,
                    tensor_size=tp_size,
                    rank=rank,
                    world_size=world_size,
                    progress=done.append,
                )
                for rank in range(world_size)
            ]
        finish_checkpoint(room, shares, mapping, architecture, dtype=dtype, tensor_size=tp_size)
        shapes = checkpoint_shapes(mapping, architecture, tp_size)
        assert sum(done) == sum(torch.Size(s).numel() for s in shapes.values()) * dtype.itemsize
        (room / "model.safetensors").unlink()
        plan = plan_shards(mapping.hf_shapes, dtype, num_writers=world_size)
        with PieceReader(room) as reader:
            assert reader.shapes == shapes
            check_checkpoint(reader, mapping, architecture)
            check_shards(reader, tensors, architecture, tp_size)
            for rank in range(world_size):
                files = plan.files_of(rank, world_size)
                write_hf_files(room, files, plan, reader, mapping, architecture, done.append)
        plan.finish(room)
        found = {}
        for file in plan.files:
            found |= load_file(room / file)
        assert found.keys() == tensors.keys()
        assert all(torch.equal(found[name], values) for name, values in tensors.items())


def check_shards(reader: PieceReader, tensors, architecture, tp_size: int) -> None:
    """What a tensor-parallel rank would ask for is its shard, also where it lies in many pieces."""
    padded = padded_vocab_size(architecture.vocab_size, tp_size)
    for entry in weight_map(architecture).entries:
        full = to_mcore(entry.kind, [tensors[t.name] for t in entry.tensors], architecture)
        if entry.kind is WeightKind.GATE_UP:
            # Two boxes; both halves are read whole on the way back.
            continue
        for rank in range(tp_size):
            shard = tp_slice(entry.kind, full, rank, tp_size, padded)
            offsets = [0] * shard.dim()
            if entry.kind is not WeightKind.REPLICATED:
                axis = int(entry.kind is WeightKind.ROW_PARALLEL)
                offsets[axis] = rank * shard.shape[axis]
            sizes = tuple(shard.shape)
            if entry.layer is not None:
                offsets, sizes = [entry.layer, *offsets], (1, *sizes)
            box = reader.read(checkpoint_key(entry), tuple(offsets), sizes)
            assert torch.equal(box.view(shard.shape), shard)


@settings(max_examples=20, deadline=None)
@given(architectures(), st.integers(1, 5))
def test_shares_are_disjoint_complete_and_even(case, world_size):
    architecture, tp_size = case
    planned = plan_pieces(weight_map(architecture), architecture, tp_size, 2)
    shares = [share_out(planned, rank, world_size) for rank in range(world_size)]
    assert sorted(map(repr, planned)) == sorted(repr(piece) for share in shares for piece in share)
    loads = [sum(torch.Size(piece.sizes).numel() for piece in share) for share in shares]
    largest = max(torch.Size(piece.sizes).numel() for piece in planned)
    assert max(loads) - min(loads) <= largest


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """One matrix in two files of one piece each."""
    from nested_reft_mcore.mcore.piece_writer import PieceWriter, write_index

    pieces = []
    for rank in range(2):
        with PieceWriter(tmp_path, rank) as writer:
            writer.add("matrix", (2 * rank, 0), torch.full((2, 3), float(rank)))
        pieces += writer.pieces
    write_index(tmp_path, pieces, {"matrix": (4, 3)}, torch.float32)
    return tmp_path


def test_what_the_files_do_not_hold_is_named(checkpoint: Path):
    with PieceReader(checkpoint) as reader:
        assert reader.read("matrix", (1, 1), (2, 1)).flatten().tolist() == [0, 1]
        with pytest.raises(UserError, match="has no tensor vector"):
            reader.read("vector", (0,), (1,))
        with pytest.raises(UserError, match=r"matrix: 3 of 6 values .* are in no piece"):
            reader.read("matrix", (3, 0), (2, 3))
    file = checkpoint / "__1_0.distcp"
    whole = file.read_bytes()
    for broken in (whole[: len(whole) // 2], b"x" * len(whole)):
        file.write_bytes(broken)
        with (
            pytest.raises(UserError, match=r"__1_0\.distcp: broken at byte 0"),
            PieceReader(checkpoint) as reader,
        ):
            reader.read("matrix", (2, 0), (2, 3))
    file.unlink()
    with (
        pytest.raises(UserError, match=r"__1_0\.distcp: cannot be read: No such file"),
        PieceReader(checkpoint) as reader,
    ):
        reader.read("matrix", (2, 0), (2, 3))


class Bomb:
    """What runs if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_piece_that_is_not_data_is_refused(checkpoint: Path):
    place = checkpoint / "__1_0.distcp"
    torch.save(Bomb(checkpoint / "bang"), place)
    with (
        pytest.raises(UserError, match=r"__1_0\.distcp: broken"),
        PieceReader(checkpoint) as reader,
    ):
        reader.read("matrix", (2, 0), (2, 3))
    assert not (checkpoint / "bang").exists()
