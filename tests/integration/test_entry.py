"""Real processes meet, work and part through the one entry of all commands."""

import sys
from pathlib import Path

import pytest

from nested_reft_mcore.launch.spawn import run_local

SCRIPT = """
import os, sys, time
from pathlib import Path
import torch
from nested_reft_mcore.cli.entry import Job, leave, run_job
from nested_reft_mcore.config.architecture import ModelArchitecture
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import ParallelConfig

def work(context, stop):
    rank, group = context.rank, context.pipeline.group
    torch.distributed.all_reduce(torch.ones(1), group=group)
    if sys.argv[1] == "dies" and rank == 1:
        os._exit(7)
    if sys.argv[1] == "refuses" and rank == 1:
        raise UserError("shard 1 is broken\\nfetch it again")
    if sys.argv[1] in ("dies", "refuses"):
        torch.distributed.all_reduce(torch.ones(1), group=group)
    return 75

def make():
    shape = ModelArchitecture(num_layers=2, hidden_size=8, num_attention_heads=2,
                              num_query_groups=2, ffn_hidden_size=8, vocab_size=11)
    return Job(ParallelConfig(pipeline_model_parallel_size=2), shape, work, stoppable=True)

def command():
    code = run_job(make)
    (Path(__file__).parent / f"code.{os.environ['RANK']}").write_text(str(int(code)))
    return code

leave(command)
"""


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("event", "code", "codes", "said"),
    [
        ("nothing", 75, {0: "75", 1: "75"}, ""),
        ("dies", 7, {}, "failed first (exit code 7)"),
        ("refuses", 2, {}, "] error: shard 1 is broken\n  fetch it again\n"),
    ],
)
def test_each_process_leaves_with_its_reason(tmp_path: Path, capfd, event, code, codes, said):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    found = run_local(
        [str(script), event], 2, command=[sys.executable], log_dir=tmp_path, grace_seconds=30
    )
    _, err = capfd.readouterr()
    assert found == code, err
    left = {rank: (tmp_path / f"code.{rank}") for rank in range(2)}
    assert {rank: path.read_text() for rank, path in left.items() if path.exists()} == codes
    assert said in err[-400:]
    assert "Traceback" not in err
