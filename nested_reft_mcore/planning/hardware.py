"""What a cluster's machines can do: built-in profiles, and profiles of the user's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator

from nested_reft_mcore.config.base import Section
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.load import parse_override, section_from_dict
from nested_reft_mcore.config.yaml_reader import read_yaml


class Assumptions(Section):
    """What no data sheet tells; every number may be replaced by a measured one."""

    reserve_gb: float = Field(default=3.0, ge=0)
    """Device memory for the CUDA context and NCCL's buffers, in 10^9 bytes."""
    fragmentation: float = Field(default=0.05, ge=0, lt=1)
    """Share of the device memory that the caching allocator cannot use."""
    matmul_efficiency: float = Field(default=0.45, gt=0, le=1)
    """Share of the peak that the update and the log-prob passes reach, kernels alone."""
    decode_efficiency: float = Field(default=0.6, gt=0, le=1)
    """Share of the memory bandwidth that decoding reaches."""
    link_efficiency: float = Field(default=0.7, gt=0, le=1)
    """Share of a link's bandwidth that a collective reaches."""
    decode_matmul_efficiency: float = Field(default=1.0, gt=0, le=1)
    """Share of the rate of `product_shares`, where there are any, that decoding reaches."""
    optimizer_efficiency: float = Field(default=0.6, gt=0, le=1)
    """Share of the memory bandwidth that the optimizer reaches."""
    layer_overhead_us: float = Field(default=15.0, ge=0)
    """Time of a layer in a decoding pass that no byte accounts for, in microseconds."""
    pass_overhead_us: float = Field(default=0.0, ge=0)
    """Time of a decoding pass apart from layers and head: the scheduler's Python, launching."""
    row_overhead_us: float = Field(default=0.0, ge=0)
    """The same for each sequence of the pass: keeping its record, embedding, drawing its token."""
    all_reduce_latency_us: float = Field(default=12.0, ge=0)
    """Time of a small all-reduce over the tensor-parallel ranks, in microseconds."""
    message_latency_us: float = Field(default=20.0, ge=0)
    """Time of a small message between two pipeline stages, in microseconds."""
    message_overhead_us: float = Field(default=0.0, ge=0)
    """What a decoding pass costs a stage itself to receive and send, in microseconds."""
    update_layer_overhead_us: float = Field(default=0.0, ge=0)
    """Time of a layer in a micro-batch, in each direction, that no operation accounts for."""
    micro_batch_overhead_us: float = Field(default=0.0, ge=0)
    """Time of a micro-batch in each direction apart from layers and head."""
    activation_traffic: float = Field(default=0.0, ge=0)
    """Times that an update reads or writes what it keeps for its backward passes; 0: hidden."""
    update_overhead_ms: float = Field(default=0.0, ge=0)
    """Fixed time of an update: clipping, the optimizer's Python, metrics; milliseconds."""
    step_overhead_ms: float = Field(default=0.0, ge=0)
    """Fixed time of a step beside generation, log-probs, updates and rewards; milliseconds."""
    prompt_fill: float = Field(default=0.25, gt=0, le=1)
    """Mean prompt, as a share of data.max_prompt_length."""
    response_fill: float = Field(default=0.5, gt=0, le=1)
    """Mean response, as a share of rollout.max_new_tokens."""
    length_spread: float = Field(default=0.7, ge=0)
    """Deviation of the logarithm of a response's length; 0: all have the mean."""
    packing_fill: float = Field(default=0.9, gt=0, le=1)
    """Share of train.max_tokens_per_micro_batch that is no padding."""
    accept_rate: float = Field(default=0.7, ge=0, lt=1)
    """Share of drafted tokens that the full policy takes, with rollout.mode=speculative."""
    reward_seconds: float = Field(default=0.01, ge=0)
    """Time of judging one completion, on one reward worker."""


class HardwareProfile(Section):
    """One kind of machine. Bandwidths are of one GPU, in one direction."""

    name: str
    """What reports call it."""
    memory_gb: float = Field(gt=0)
    """Device memory in 10^9 bytes."""
    peak_tflops: float = Field(gt=0)
    """Dense bfloat16 matrix products, 10^12 operations a second."""
    peak_tflops_float32: float = Field(gt=0)
    """Float32 without TF32, which torch does not use unless told to."""
    memory_gb_per_s: float = Field(gt=0)
    """Device memory, in 10^9 bytes a second."""
    node_link_gb_per_s: float = Field(gt=0)
    """To other GPUs of the node."""
    network_gb_per_s: float = Field(gt=0)
    """To GPUs of other nodes."""
    host_link_gb_per_s: float = Field(gt=0)
    """To host memory."""
    host_memory_gb: float | None = Field(default=None, gt=0)
    """Host memory of a node; left out: reported, not checked."""
    kernels: Literal["fused", "cpu"] = "fused"
    """`cpu`: norms and SwiGLU are single operators, which keep more for the backward pass."""
    product_shares: tuple[tuple[float, float], ...] = ()
    """Rows of a decoding product, and its share of the peak; left out: all reach the same."""
    busy_processes: int = Field(default=1, gt=0)
    """Processes of a node that were at work together when the next two were measured."""
    busy_compute_share: float = Field(default=1.0, gt=0, le=1)
    """Share of its product rate that a process keeps then; 1 where each has a device of its own."""
    busy_memory_share: float = Field(default=1.0, gt=0, le=1)
    """The same of its memory bandwidth."""
    source: str = ""
    """Where the figures come from."""
    assumptions: Assumptions = Assumptions()

    @field_validator("product_shares")
    @classmethod
    def _check_shares(cls, shares: tuple[tuple[float, float], ...]) -> Any:
        rows = [row for row, _ in shares]
        if any(row < 1 or share <= 0 for row, share in shares) or rows != sorted(set(rows)):
            raise ValueError("expected pairs [rows, share], rows ascending from 1, shares above 0")
        return shares

    def crowded(self, num_processes: int) -> HardwareProfile:
        """What each of so many processes of a node has while all of them work.

        Between one process and `busy_processes` shares fall evenly; beyond, what there is is
        divided. Devices that share nothing stay as they are.
        """
        compute = _share_left(self.busy_compute_share, self.busy_processes, num_processes)
        memory = _share_left(self.busy_memory_share, self.busy_processes, num_processes)
        if compute == memory == 1.0:
            return self
        return self.model_copy(
            update={
                "peak_tflops": self.peak_tflops * compute,
                "peak_tflops_float32": self.peak_tflops_float32 * compute,
                "memory_gb_per_s": self.memory_gb_per_s * memory,
                "busy_processes": 1,
                "busy_compute_share": 1.0,
                "busy_memory_share": 1.0,
            }
        )


def _share_left(share: float, measured: int, count: int) -> float:
    if measured == 1 or count == 1:
        return 1.0
    if count <= measured:
        return 1 - (1 - share) * (count - 1) / (measured - 1)
    # All that the node has, once it is used up; never more than each had.
    return share if share == 1.0 else share * measured / count


_HOPPER = (
    "NVIDIA's data sheet of the SXM5 card (989 TFLOPS is half of the figure printed with "
    "sparsity; NVLink 900 GB/s and PCIe Gen5 128 GB/s count both directions); network: one 400 "
    "Gb/s port for each GPU, as in DGX H100 and H200"
)
BUILT_IN: dict[str, HardwareProfile] = {
    "a100-80": HardwareProfile(
        name="a100-80",
        memory_gb=80,
        peak_tflops=312,
        peak_tflops_float32=19.5,
        memory_gb_per_s=2039,
        node_link_gb_per_s=300,
        network_gb_per_s=25,
        host_link_gb_per_s=32,
        source=(
            "NVIDIA's data sheet of the A100 80GB SXM (NVLink 600 GB/s and PCIe Gen4 64 GB/s "
            "count both directions); network: one 200 Gb/s port for each GPU, as in DGX A100"
        ),
    ),
    "h100": HardwareProfile(
        name="h100",
        memory_gb=80,
        peak_tflops=989,
        peak_tflops_float32=67,
        memory_gb_per_s=3350,
        node_link_gb_per_s=450,
        network_gb_per_s=50,
        host_link_gb_per_s=64,
        source=_HOPPER,
    ),
    "h200": HardwareProfile(
        name="h200",
        memory_gb=141,
        peak_tflops=989,
        peak_tflops_float32=67,
        memory_gb_per_s=4800,
        node_link_gb_per_s=450,
        network_gb_per_s=50,
        host_link_gb_per_s=64,
        source=_HOPPER,
    ),
}
DEFAULT_HARDWARE = "h100"


def load_hardware(name: str, assumptions: Sequence[str] = ()) -> HardwareProfile:
    """A built-in profile, or that of a YAML file, with some assumptions replaced.

    A file has the fields of `HardwareProfile`; with `base: h100` it has those that differ from a
    built-in one.

    Args:
        name: One of `BUILT_IN`, or a path that ends in .yaml or .yml.
        assumptions: `NAME=VALUE` each.

    Raises:
        UserError: no such profile or file, an unknown key or a value that cannot be.
    """
    sources: dict[str, str] = {}
    if name in BUILT_IN:
        data: dict[str, Any] = BUILT_IN[name].model_dump()
        source = f"--hardware {name}"
    elif Path(name).suffix in (".yaml", ".yml"):
        file = read_yaml(name)
        data, source = _with_base(file.data, name), str(file.path)
        sources = file.sources
    else:
        raise UserError(
            f"--hardware {name}: no such profile; expected {', '.join(BUILT_IN)} or a YAML file"
        )
    for text in assumptions:
        key, value = parse_override(text)
        if not isinstance(data.setdefault("assumptions", {}), dict):
            raise UserError(f"{source}: `assumptions` is no section")
        data["assumptions"] = {**data["assumptions"], key: value}
        sources[f"assumptions.{key}"] = f"--assume {text}"
    return section_from_dict(HardwareProfile, data, source, sources)


def _with_base(found: Mapping[str, Any], path: str) -> dict[str, Any]:
    """A file's fields over those of the built-in profile that it names."""
    base = found.get("base")
    if base is None:
        return {"name": Path(path).stem, **found}
    if base not in BUILT_IN:
        raise UserError(f"{path}: base: {base!r} is no profile; expected {', '.join(BUILT_IN)}")
    data = {**BUILT_IN[base].model_dump(), "name": Path(path).stem}
    given = found.get("assumptions")
    if isinstance(given, dict):
        given = {**data["assumptions"], **given}
    changes = {key: value for key, value in found.items() if key != "base"}
    return {**data, **changes, **({"assumptions": given} if given is not None else {})}
