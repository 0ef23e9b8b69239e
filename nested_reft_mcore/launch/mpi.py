"""mpirun's processes find each other: MPI brings all of them rank 0's address, and ends them.

MPI stays up from the exchange to the common end. A process that leaves without MPI_Finalize, by an
error or a signal, then makes mpirun end the others; after an early MPI_Finalize MPICH 4 would let
them wait. Nobody waits in MPI_Finalize for the dead: only an end that all have reached calls it.
"""

from __future__ import annotations

import dataclasses
import os
import socket
import warnings
from collections.abc import Sequence

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.launch.exit_codes import ExitCode
from nested_reft_mcore.launch.mpi_library import library_name, load_mpi


class MpiWorld:
    """The processes of one mpirun, from the exchange of rank 0's address to their common end."""

    def __init__(self, ranks: RankInfo) -> None:
        """Start MPI and learn where rank 0 listens. All processes of the mpirun call this.

        Rank 0 opens torch's store on the port that it tells, so nobody else can take it before the
        process group meets there. `MASTER_ADDR` and `MASTER_PORT` are taken where set.

        Args:
            ranks: as read from mpirun's environment, without an address.

        Raises:
            UserError: mpi4py is missing, or speaks to another MPI than this mpirun; or the port is
                taken.
        """
        self._mpi = load_mpi("openmpi" if "OMPI_COMM_WORLD_RANK" in os.environ else "mpich")
        with warnings.catch_warnings():
            # mpi4py's own doubts about the library; they are put into words below.
            warnings.simplefilter("ignore", RuntimeWarning)
            # Other threads exist, but only the main one speaks MPI.
            self._mpi.Init_thread(self._mpi.THREAD_FUNNELED)
        self._world = self._mpi.COMM_WORLD
        if (self._world.rank, self._world.size) != (ranks.rank, ranks.world_size):
            library = library_name(self._mpi.Get_library_version())
            raise UserError(
                f"mpirun: started {ranks.world_size} processes, but mpi4py counts "
                f"{self._world.size}: it has loaded {library}; expected the MPI that this mpirun "
                "belongs to; set MPI4PY_MPIABI to openmpi or mpich, put the library into "
                "LD_LIBRARY_PATH, or build mpi4py against it with "
                "`pip install --no-binary mpi4py mpi4py`"
            )
        node = self._world.Split_type(self._mpi.COMM_TYPE_SHARED)
        local_rank, local_world_size = node.rank, node.size
        node.Free()
        place = None
        if ranks.rank == 0:
            address = _own_address(local_world_size == ranks.world_size)
            self._store = _open_store(address)
            place = (address, self._store.port)
        address, port = self._world.bcast(place)
        self.ranks = dataclasses.replace(
            ranks,
            local_rank=local_rank,
            local_world_size=local_world_size,
            master_addr=address,
            master_port=port,
        )
        """This process with the node and the meeting point that MPI found."""

    def part(self, code: int) -> int:
        """End MPI together; all processes of the mpirun call this, and leave at once after it.

        Once one has left, mpirun may kill the others; nothing is left for them to do. All leave
        with the same code: MPICH 5 forgets the code of one that leaves after a 0.

        Args:
            code: this process's own.

        Returns:
            What all of them leave with.
        """
        codes = self._world.allgather(int(code))
        self._mpi.Finalize()
        return common_code(codes)


def common_code(codes: Sequence[int]) -> int:
    """One exit code for processes that have all come to their end.

    Theirs if they agree; else the first that tells of a failure; else, where only some were asked
    to come back, 1.
    """
    if len(set(codes)) == 1:
        return codes[0]
    failed = [code for code in codes if code not in (ExitCode.OK, ExitCode.COME_BACK)]
    return failed[0] if failed else ExitCode.FAILURE


def _open_store(address: str) -> TCPStore:
    port = os.environ.get("MASTER_PORT", "0")
    if not port.isdigit() or int(port) > 65535:
        raise UserError(f"environment: MASTER_PORT={port!r}; expected a port up to 65535")
    try:
        # The process group's own store of rank 0 will find this one and use it.
        return TCPStore(
            address, int(port), is_master=True, wait_for_workers=False, multi_tenant=True
        )
    except RuntimeError as error:
        raise UserError(
            f"mpirun: rank 0 cannot listen on {address}, port {port}: {error}; set or unset "
            "MASTER_ADDR and MASTER_PORT"
        ) from error


def _own_address(one_node: bool) -> str:
    """Where the processes reach this one."""
    if os.environ.get("MASTER_ADDR"):
        return os.environ["MASTER_ADDR"]
    if one_node:
        return "127.0.0.1"
    try:
        named = socket.gethostbyname(socket.gethostname())
    except OSError:
        named = "127.0.0.1"
    # Debian gives a host's own name a loopback address, which means another host elsewhere.
    return _outward_address() if named.startswith("127.") else named


def _outward_address() -> str:
    """The address of the interface that leads out; the host's name if none does."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # A datagram socket sends nothing on connecting; the address is one for documentation.
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return socket.gethostname()
        return probe.getsockname()[0]
