"""What `nested-reft bench hardware` has found on one machine, or on several."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from nested_reft_mcore.bench.link_rates import LinkRate, Place
from nested_reft_mcore.bench.memory_rates import MemoryRate
from nested_reft_mcore.bench.products import Kind, ProductRate
from nested_reft_mcore.bench.timing import Measured


@dataclass(frozen=True)
class Sharing:
    """What a process keeps of its rates while all processes of its node work, against alone."""

    processes: int
    compute: Measured
    """Of a large matrix product; 1: they do not get in each other's way."""
    memory: Measured
    """Of a matrix times a vector that reads memory."""


@dataclass(frozen=True)
class HardwareResults:
    """Everything, as measured."""

    device: Literal["cpu", "cuda"]
    device_name: str
    device_bytes: int
    """Memory of a GPU; on a CPU a process's share of the machine's."""
    host_bytes: int
    processes: int
    nodes: int
    threads: int
    """Of each process."""
    products: tuple[ProductRate, ...]
    memory: tuple[MemoryRate, ...]
    sharing: Sharing | None
    """None with one process on the node."""
    links: tuple[LinkRate, ...]
    environment: dict[str, Any]
    quick: bool = False
    """Taken at tiny sizes, which measure little."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"what": "bench hardware", **asdict(self)}

    def products_of(self, kind: Kind, dtype: str) -> list[ProductRate]:
        """Products of one kind and type of numbers."""
        return [p for p in self.products if p.kind == kind and p.dtype == dtype]

    def links_of(self, place: Place, what: str) -> list[LinkRate]:
        """One operation in one place, ascending in size."""
        found = [link for link in self.links if link.place == place and link.what == what]
        return sorted(found, key=lambda link: link.num_bytes)
