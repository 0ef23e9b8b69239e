"""A real Slurm of several nodes on this host: as root, without systemd, cgroups or GPUs.

Needs Debian's slurmctld, slurmd, slurm-client and munge. Declares 8 GPUs and 64 CPUs a node, which
are not there: the shipped scripts ask for them. By hand, until Ctrl-C:

    python tests/slurm/slurm_cluster.py 4
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from nested_reft_mcore.launch.parent import signal_at_parents_death

PROGRAMS = ("slurmctld", "slurmd", "srun", "sbatch", "munged", "mungekey")
HOSTS = Path("/etc/hosts")
START_SECONDS = 60.0
STUCK_SECONDS = 60.0
"""Nothing here takes as long to end, not even on a node that is lost."""

# Without cgroups a task is a process group. cred_expire shortens the pause before a requeued job
# starts from 125 to 10 seconds. `low` is preempted by `high`, with two minutes' notice; `abrupt`
# without any. config_overrides: believe this file rather than the machine.
SLURM_CONF = """
ClusterName=nested
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.%n.pid
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool/%n
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd.%n.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
GresTypes=gpu
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,preempt_youngest_first
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
JobCompType=jobcomp/none
JobRequeue=1
ReturnToService=2
SlurmdParameters=config_overrides
SlurmdTimeout=15
KillWait=5
MinJobAge=600
MailProg=/bin/true
MessageTimeout=30
{nodes}
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 GraceTime=120 State=UP
PartitionName=abrupt Nodes=ALL PriorityTier=1 State=UP
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF State=UP
"""
NODE = (
    "NodeName=node{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} "
    "CPUs=64 RealMemory=1000000 Gres=gpu:8 State=UNKNOWN"
)


def why_not() -> str:
    """Why no cluster can be started here; empty if one can."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        return (
            f"no Slurm here: {', '.join(missing)} not found; "
            "apt-get install slurmctld slurmd slurm-client munge"
        )
    return "" if os.geteuid() == 0 else "a cluster of Slurm can only be started by root"


class SlurmCluster:
    """Daemons of one cluster, with files of their own in `directory`."""

    def __init__(self, directory: Path, num_nodes: int) -> None:
        self.directory = directory
        self.num_nodes = num_nodes
        self.conf = directory / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._completing: dict[str, float] = {}

    def environment(self) -> dict[str, str]:
        """This process's environment, turned to the cluster."""
        return {**os.environ, "SLURM_CONF": str(self.conf)}

    def call(self, *command: str) -> str:
        """Standard output of a command of Slurm. Raises CalledProcessError."""
        done = subprocess.run(
            command, capture_output=True, text=True, check=True, env=self.environment()
        )
        return done.stdout

    def start_node(self, number: int) -> None:
        """Start the daemon of a node, numbered from 1."""
        self._daemon(f"node{number}", "slurmd", "-D", "-f", str(self.conf), "-N", f"node{number}")

    def lose_node(self, number: int) -> None:
        """End a node as if its power had gone: its daemon, its tasks and who looks after them."""
        daemon = psutil.Process(self._daemons[f"node{number}"].pid)
        mine = [daemon]
        for step in self._steps_on(number):
            with contextlib.suppress(psutil.Error):
                mine += [step, *step.children(recursive=True)]
        for process in mine:
            with contextlib.suppress(psutil.Error):
                process.suspend()
        for process in mine:
            with contextlib.suppress(psutil.Error):
                process.kill()

    def _steps_on(self, number: int) -> list[psutil.Process]:
        """The slurmstepd of a node: no children of its slurmd."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.name().startswith("slurmstepd") and self._is_on(process, number):
                    found.append(process)
        return found

    def _is_on(self, process: psutil.Process, number: int) -> bool:
        """Whether a slurmstepd listens for the slurmd of this node."""
        spool = self.directory / "spool" / f"node{number}"
        sockets = process.net_connections(kind="unix")
        return any(spool in Path(str(one.laddr)).parents for one in sockets)

    def free_stuck_nodes(self) -> None:
        """Start the daemons of nodes anew on which a job has been ending for long.

        It is rare and was seen on one node at a time, whose slurmd then ends no job any more; what
        all of its processes are doing is told as a warning.
        """
        now = time.monotonic()
        shown = self.call("squeue", "--noheader", "--states=COMPLETING", "--format=%A %N")
        ending = dict(line.split(maxsplit=1) for line in shown.splitlines())
        self._completing = {job: self._completing.get(job, now) for job in ending}
        for job, since in self._completing.items():
            if now - since > STUCK_SECONDS:
                names = self.call("scontrol", "show", "hostnames", ending[job]).split()
                for number in (int(name.removeprefix("node")) for name in names):
                    self._restart_node(number, job)
                self._completing[job] = now

    def _restart_node(self, number: int, job: str) -> None:
        """Its daemon, and the steps of the job that it cannot end; other jobs go on."""
        daemon = self._daemons[f"node{number}"]
        if daemon.poll() is not None:
            return
        told, stuck = [_state_of(psutil.Process(daemon.pid))], list[psutil.Process]()
        for step in self._steps_on(number):
            with contextlib.suppress(psutil.Error):
                told.append(_state_of(step))
                if f"[{job}." in " ".join(step.cmdline()):
                    stuck.append(step)
        log = self.directory / f"slurmd.node{number}.log"
        text = "\n".join(log.read_text(errors="replace").splitlines()[-40:])
        said = "\n".join([f"node{number} does not end job {job}", *told, text])
        warnings.warn(said, stacklevel=2)
        for process in (*stuck, daemon):
            with contextlib.suppress(psutil.Error):
                process.kill()
        daemon.wait()
        self.start_node(number)

    def stop(self) -> None:
        """End every job and daemon."""
        with contextlib.suppress(subprocess.SubprocessError):
            self._call("scancel", "--user=root")
            self._call("scancel", "--user=root", "--signal=KILL", "--full")
            _wait(lambda: not self.call("squeue", "--noheader").strip(), 20, check=False)
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
        for daemon in self._daemons.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                daemon.wait(timeout=10)
            daemon.kill()
            daemon.wait()

    def _daemon(self, name: str, *command: str) -> None:
        """Start one in the foreground, so that it ends with this process, however that ends."""
        self._daemons[name] = subprocess.Popen(
            command,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=_end_with_parent,
        )

    def _call(self, *command: str) -> None:
        subprocess.run(command, check=True, env=self.environment(), stdout=subprocess.DEVNULL)

    def _write_files(self) -> None:
        host = socket.gethostname().split(".")[0]
        ports = _free_ports(self.num_nodes + 1)
        for name in ("state", *(f"spool/node{n + 1}" for n in range(self.num_nodes))):
            (self.directory / name).mkdir(parents=True)
        nodes = [
            NODE.format(number=number, host=host, port=ports[number])
            for number in range(1, self.num_nodes + 1)
        ]
        text = SLURM_CONF.format(
            host=host, port=ports[0], directory=self.directory, nodes="\n".join(nodes)
        )
        self.conf.write_text(text)
        for number in range(8):
            (self.directory / f"gpu{number}").touch()
        (self.directory / "gres.conf").write_text(f"Name=gpu File={self.directory}/gpu[0-7]\n")
        _name_nodes(self.num_nodes)

    def start(self) -> None:
        """Start every daemon and wait until all nodes are idle."""
        self._write_files()
        munge = self.directory / "munge"
        key = f"{munge}.key"
        self._call("mungekey", "--create", f"--keyfile={key}")
        files = [f"--{name}-file={munge}.{name}" for name in ("seed", "log", "pid")]
        socket_option = f"--socket={munge}.socket"
        options = ("--foreground", "--force", socket_option, f"--key-file={key}", *files)
        self._daemon("munged", "munged", *options)
        _wait(Path(f"{munge}.socket").exists, START_SECONDS)
        self._daemon("slurmctld", "slurmctld", "-D", "-f", str(self.conf))
        for number in range(1, self.num_nodes + 1):
            self.start_node(number)
        _wait(self.is_idle, START_SECONDS)

    def is_idle(self) -> bool:
        """Whether every node is up and without a job."""
        with contextlib.suppress(subprocess.CalledProcessError):
            return self._count_idle() == self.num_nodes
        # The controller does not answer yet.
        return False

    def _count_idle(self) -> int:
        shown = self.call("sinfo", "--noheader", "--partition=low", "--states=idle", "--format=%D")
        return sum(map(int, shown.split()))


def _state_of(process: psutil.Process) -> str:
    """What each thread of a process waits for, as the kernel tells it."""
    found = [f"{process.pid} {process.name()} {process.status()} {process.cmdline()}"]
    with contextlib.suppress(OSError):
        for thread in sorted(Path(f"/proc/{process.pid}/task").iterdir()):
            call = (thread / "syscall").read_text().split()[:1]
            found.append(f"  {thread.name} {(thread / 'wchan').read_text()} {call}")
    return "\n".join(found)


def _end_with_parent() -> None:
    signal_at_parents_death(signal.SIGTERM)


def _free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below those that the system hands out by itself."""
    found: list[int] = []
    while len(found) < count:
        port = random.SystemRandom().randrange(10000, 15000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            found.append(port)
    return found


def _name_nodes(num_nodes: int) -> None:
    """Names of nodes have to resolve: MASTER_ADDR is one of them."""
    text = HOSTS.read_text()
    names = text.split()
    missing = [f"node{n + 1}" for n in range(num_nodes) if f"node{n + 1}" not in names]
    if missing:
        with HOSTS.open("a") as file:
            file.write("".join(f"127.0.0.1 {name} # nested-reft's tests\n" for name in missing))


def _wait(condition: Callable[[], bool], seconds: float, *, check: bool = True) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            if check:
                raise TimeoutError(f"no Slurm after {seconds} seconds")
            return
        time.sleep(0.1)


@contextlib.contextmanager
def slurm_cluster(num_nodes: int) -> Iterator[SlurmCluster]:
    """A cluster that lives as long as the `with` block."""
    # A socket's path may have 107 characters, fewer than pytest's directories need.
    directory = Path(tempfile.mkdtemp(prefix="slurm_"))
    cluster = SlurmCluster(directory, num_nodes)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    if reason := why_not():
        sys.exit(reason)
    with slurm_cluster(int(sys.argv[1]) if len(sys.argv) > 1 else 2) as running:
        ends = {signal.SIGINT, signal.SIGTERM}
        signal.pthread_sigmask(signal.SIG_BLOCK, ends)
        print(f"export SLURM_CONF={running.conf}", flush=True)
        signal.sigwait(ends)
