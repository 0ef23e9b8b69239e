"""Peers that are missing, break or mumble: the table says why, and nothing hangs."""

import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from nested_reft_mcore.bench.line_worker import LineWorker, WorkerFailed
from nested_reft_mcore.bench.peer_set import PeerSet
from nested_reft_mcore.bench.peers import PeerUnavailable, TransformersPeer, VllmPeer
from nested_reft_mcore.config.bench import PeerName
from nested_reft_mcore.launch.context import ParallelContext, ParallelDimension

ALONE = ParallelDimension(0, 1, (0,))
CONTEXT = ParallelContext(0, 1, 0, torch.device("cpu"), ALONE, ALONE, ALONE)


def python(code: str) -> LineWorker:
    return LineWorker([sys.executable, "-c", code], {})


def vllm(python: str) -> VllmPeer:
    return VllmPeer(
        python, Path("model"), "float32", 1, max_sequences=2, max_length=8, kv_gigabytes=3
    )


def test_worker_answers_line_by_line_whatever_goes_to_stderr():
    code = (
        "import json, sys\n"
        "print('noise', file=sys.stderr)\n"
        "for line in sys.stdin: print(json.dumps({'twice': 2 * json.loads(line)['x']}), flush=True)"
    )
    with python(code) as worker:
        assert worker.ask({"x": 3}) == {"twice": 6}
        assert worker.ask({"x": 5}) == {"twice": 10}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import sys; sys.exit('no memory')", "left with 1: no memory"),
        ("print('loading ...')", "no JSON object"),
        ("raise ImportError('no such thing')", "no such thing"),
    ],
)
def test_worker_that_fails_says_why(code: str, reason: str):
    with python(code) as worker, pytest.raises(WorkerFailed, match=reason):
        worker.hear(30)


def test_worker_that_hangs_is_ended():
    started = time.monotonic()
    with (
        python("import time; time.sleep(60)") as worker,
        pytest.raises(WorkerFailed, match="took too long"),
    ):
        worker.hear(0.2)
    assert time.monotonic() - started < 20


def test_a_request_to_a_worker_that_has_left():
    with python("pass") as worker:
        time.sleep(0.5)
        with pytest.raises(WorkerFailed, match="left"):
            worker.ask({})


def test_vllm_without_an_interpreter_or_without_vllm():
    with pytest.raises(PeerUnavailable, match="No such file"):
        vllm("/nowhere/python")
    with pytest.raises(PeerUnavailable, match="No module named 'vllm'"):
        vllm(sys.executable)


def test_transformers_without_a_model(tmp_path: Path):
    with pytest.raises(PeerUnavailable):
        TransformersPeer(tmp_path, torch.float32, torch.device("cpu"), 1)


def test_transformers_generates_every_token_whatever_would_stop_it(tmp_path: Path):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=list(range(32)),
    )
    model = LlamaForCausalLM(config)
    model.generation_config.eos_token_id = list(range(32))
    model.save_pretrained(tmp_path)
    peer = TransformersPeer(tmp_path, torch.float32, torch.device("cpu"), 1)
    assert peer.generate([[1, 2, 3], [4, 5, 6]], 7) > 0
    assert peer.version
    # One token each, where it may stop: found out, not reported as fast.
    peer._model.generation_config.eos_token_id = list(range(32))
    with pytest.raises(PeerUnavailable, match="generated 2 tokens where 2 x 7"):
        peer.generate([[1, 2, 3], [4, 5, 6]], 7)


FAKE_VLLM = """
import os, sys
from types import SimpleNamespace
__version__ = "9.9"
print("noise on stdout", flush=True)
SamplingParams = SimpleNamespace
class LLM:
    def __init__(self, **settings):
        assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        assert os.environ["OMP_NUM_THREADS"] == "1"
        assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "3"
        assert settings["max_num_seqs"] == 2 and not settings["enable_prefix_caching"]
        os.system("echo noise of a child")
    def generate(self, prompts, sampling, use_tqdm):
        print("more noise", flush=True)
        assert sampling.ignore_eos
        count = min(sampling.max_tokens, 5)
        done = SimpleNamespace(outputs=[SimpleNamespace(token_ids=[0] * count)])
        return [done for prompt in prompts if prompt["prompt_token_ids"]]
"""


def test_vllm_speaks_in_lines_whatever_it_prints(tmp_path: Path):
    # Not vLLM: what is tested is the conversation with the other interpreter.
    (tmp_path / "vllm.py").write_text(FAKE_VLLM)
    interpreter = tmp_path / "python"
    interpreter.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    interpreter.chmod(0o755)
    peer = vllm(str(interpreter))
    try:
        assert peer.version == "9.9"
        assert 0 < peer.generate([[1], [2]], 5) < 10
        with pytest.raises(PeerUnavailable, match="generated 10 tokens where 2 x 6"):
            peer.generate([[1], [2]], 6)
    finally:
        peer.close()


class BreakingPeer:
    """Generates once, then breaks."""

    name: PeerName = "vllm"
    version = "1.0"

    def __init__(self) -> None:
        self.num_calls = 0
        self.is_closed = False

    def generate(self, prompts: object, new_tokens: int) -> float:
        self.num_calls += 1
        if self.num_calls > 1:
            raise PeerUnavailable("out of memory")
        return 1.5

    def close(self) -> None:
        self.is_closed = True


def test_a_peer_that_breaks_is_not_asked_again():
    peer = BreakingPeer()

    def unavailable() -> BreakingPeer:
        raise PeerUnavailable("not installed")

    with PeerSet(CONTEXT) as peers:
        peers.start("vllm", lambda: peer)
        peers.start("transformers", unavailable)
        assert peers.names == ["vllm"]
        assert peers.reasons == {"transformers": "not installed"}
        assert [peers.generate("vllm", [[1]], 4) for _ in range(3)] == [1.5, None, None]
        assert peers.reasons["vllm"] == "out of memory"
        assert peers.names == []
    assert (peer.num_calls, peer.is_closed) == (2, True)
