"""Peers that are missing, break or mumble: the table says why, and nothing hangs."""

import sys
import time
from pathlib import Path

import pytest
import torch

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
    return VllmPeer(python, Path("model"), "float32", 1, max_sequences=2, max_length=8)


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
