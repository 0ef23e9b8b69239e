"""Real processes: exit codes, signals, output, and nobody left behind."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from nested_reft_mcore.launch.spawn import run_local

LAUNCHER = """
import sys
from pathlib import Path
from nested_reft_mcore.launch.spawn import run_local
script, size, grace, logs = sys.argv[1:]
code = run_local([script], int(size), command=[sys.executable, "-u"], log_dir=Path(logs),
                 grace_seconds=float(grace))
sys.exit(code)
"""


PREAMBLE = """
import os, signal, sys, time
from pathlib import Path
rank = int(os.environ["RANK"])
here = Path(__file__).parent
def note(name):
    (here / f"{name}.{rank}.part").write_text(str(os.getpid()))
    (here / f"{name}.{rank}.part").rename(here / f"{name}.{rank}")
def wait_for(name):
    while not (here / name).exists():
        time.sleep(0.01)
"""


def write_script(directory: Path, body: str) -> Path:
    script = directory / "script.py"
    script.write_text(PREAMBLE + textwrap.dedent(body))
    return script


class Launched:
    """A launcher process with its workers' directory."""

    def __init__(self, directory: Path, body: str, size: int, grace: float):
        script = write_script(directory, body)
        self.directory = directory
        self.size = size
        self.process = subprocess.Popen(
            [
                sys.executable,
                "-c",
                LAUNCHER,
                str(script),
                str(size),
                str(grace),
                str(directory / "logs"),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_for(self, name: str) -> list[int]:
        """Process ids of the workers, once all have noted `name`."""
        files = [self.directory / f"{name}.{rank}" for rank in range(self.size)]
        deadline = time.monotonic() + 60
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline, f"no {name} after a minute"
            assert self.process.poll() is None, self.process.communicate()
            time.sleep(0.02)
        return [int(file.read_text()) for file in files]

    def finish(self) -> tuple[int, str, str]:
        out, err = self.process.communicate(timeout=60)
        return self.process.returncode, out, err


@pytest.fixture
def launch(tmp_path):
    started: list[Launched] = []

    def start(body: str, size: int = 2, grace: float = 0.5) -> Launched:
        directory = tmp_path / str(len(started))
        directory.mkdir()
        started.append(Launched(directory, body, size, grace))
        return started[-1]

    yield start
    for launched in started:
        launched.process.kill()
        launched.process.wait()


def gone(pids: list[int], seconds: float = 10.0) -> bool:
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.fixture
def run_here(tmp_path, capfd):
    """Run in this process: code, stdout and stderr. Quicker, but a signal would hit the tests."""

    def run(body: str, grace: float = 0.5) -> tuple[int, str, str]:
        script = write_script(tmp_path, body)
        command = [sys.executable, "-u"]
        code = run_local(
            [str(script)], 2, command=command, log_dir=tmp_path / "logs", grace_seconds=grace
        )
        return code, *capfd.readouterr()

    return run


def test_workers_meet_and_only_rank_0_writes_to_the_console(run_here, tmp_path):
    code, out, err = run_here(
        """
        import torch, torch.distributed as dist
        from nested_reft_mcore.launch.ranks import discover_ranks
        ranks = discover_ranks(os.environ)
        dist.init_process_group("gloo", rank=ranks.rank, world_size=ranks.world_size)
        total = torch.tensor([ranks.rank + 1])
        dist.all_reduce(total)
        policy = os.environ["OMP_WAIT_POLICY"]
        print("sum", total.item(), ranks.launcher, ranks.local_world_size, policy)
        print("aside", rank, file=sys.stderr)
        # gloo's threads abort a process that ends while they run.
        dist.destroy_process_group()
        """,
    )
    assert code == 0, err
    assert out == "sum 3 local 2 passive\n"
    assert "aside 0" in err
    assert "aside 1" not in err
    logs = {path.name: path.read_text() for path in (tmp_path / "logs").glob("*.stdout")}
    assert logs == {"rank_1.stdout": "sum 3 local 2 passive\n"}


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("", 0),
        ("sys.exit(75)", 75),
        ("sys.exit(2 if rank == 1 else 0)", 2),
        ("sys.exit(75 if rank == 0 else 3)", 3),
        ("sys.exit(75 if rank == 0 else 0)", 1),
        ("os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else None", 128 + signal.SIGKILL),
        ("sys.exit(4 if rank == 0 else 5)", 5),
    ],
)
def test_exit_codes(run_here, body, expected):
    code, _, err = run_here(body, grace=20)
    assert code == expected, err


def test_the_first_failure_counts_and_not_what_its_peers_make_of_it(run_here):
    body = """
        if rank == 1:
            note("gone")
            sys.exit(7)
        wait_for("gone.1")
        time.sleep(0.5)
        sys.exit(1)
        """
    assert run_here(body, grace=20)[0] == 7


def test_the_handlers_of_the_caller_come_back(run_here):
    numbers = (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(number) for number in numbers]
    run_here("")
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_first_error_is_printed_last_with_its_rank(run_here):
    code, _, err = run_here(
        """
        if rank == 1:
            wait_for("up.0")
            raise RuntimeError("the cause")
        print("rank 0 is well", file=sys.stderr, flush=True)
        note("up")
        time.sleep(60)
        """
    )
    assert code == 1
    lines = err.splitlines()
    last = f"rank 1 on {socket.gethostname()} failed first (exit code 1); logs: "
    assert lines[-1].startswith(last)
    assert lines[-2] == "RuntimeError: the cause"
    assert err.index("rank 0 is well") < err.index("the cause")


def test_a_mistake_that_all_ranks_refuse_is_told_by_rank_0_alone(run_here):
    code, _, err = run_here("print('error: mistake', file=sys.stderr); sys.exit(2)", grace=20)
    assert code == 2
    assert err == "error: mistake\n"


def test_a_mistake_that_one_rank_finds_is_told_without_ado(run_here):
    body = "if rank: print('error: my shard', file=sys.stderr); sys.exit(2)"
    code, _, err = run_here(body, grace=20)
    assert code == 2
    assert err == "error: my shard\n"


def test_a_worker_that_ignores_sigterm_is_killed_after_its_grace(launch):
    launched = launch(
        """
        signal.signal(signal.SIGTERM, lambda *_: note("asked"))
        note("up")
        if rank == 1:
            wait_for("up.0")
            sys.exit(6)
        while True:
            time.sleep(1)
        """
    )
    code, _, err = launched.finish()
    assert code == 6, err
    assert (launched.directory / "asked.0").exists()
    assert gone([int((launched.directory / "up.0").read_text())])


def test_peers_of_a_failed_worker_may_finish_within_the_grace(launch):
    launched = launch("time.sleep(0 if rank else 1.0); note('end'); sys.exit(rank)", grace=20)
    assert launched.finish()[0] == 1
    assert (launched.directory / "end.0").exists()


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_request_to_stop_reaches_every_worker(launch, number):
    launched = launch(
        """
        from nested_reft_mcore.launch.signals import StopSignals
        with StopSignals() as stop:
            note("up")
            while not stop.requested:
                time.sleep(0.01)
            (here / f"got.{rank}").write_text(stop.received.name)
        sys.exit(75)
        """
    )
    launched.wait_for("up")
    launched.process.send_signal(number)
    code, _, err = launched.finish()
    assert code == 75, err
    for rank in range(2):
        assert (launched.directory / f"got.{rank}").read_text() == number.name


def test_a_stop_that_comes_before_a_worker_listens_is_not_lost(launch):
    launched = launch(
        """
        from nested_reft_mcore.launch.signals import StopSignals
        note("up")
        time.sleep(1.0)
        with StopSignals() as stop:
            while not stop.requested:
                time.sleep(0.01)
        sys.exit(75)
        """
    )
    launched.wait_for("up")
    launched.process.send_signal(signal.SIGUSR1)
    assert launched.finish()[0] == 75


def test_an_interrupt_ends_even_deaf_workers(launch):
    launched = launch(
        """
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note("up")
        while True:
            time.sleep(1)
        """
    )
    pids = launched.wait_for("up")
    launched.process.send_signal(signal.SIGINT)
    assert launched.finish()[0] == 128 + signal.SIGINT
    assert gone(pids)


def test_no_worker_survives_a_killed_launcher(launch):
    launched = launch(
        """
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        note("up")
        while True:
            time.sleep(1)
        """,
        size=3,
    )
    pids = launched.wait_for("up")
    assert all(alive(pid) for pid in pids)
    launched.process.kill()
    assert gone(pids)


def test_helpers_of_a_killed_worker_are_cleaned_up(launch):
    launched = launch(
        """
        import subprocess
        helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        (here / f"helper.{rank}").write_text(str(helper.pid))
        note("up")
        time.sleep(600)
        """
    )
    first, second = launched.wait_for("up")
    helpers = [int((launched.directory / f"helper.{rank}").read_text()) for rank in range(2)]
    os.kill(first, signal.SIGKILL)
    assert launched.finish()[0] == 128 + signal.SIGKILL
    assert gone([second, *helpers])
