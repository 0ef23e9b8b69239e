"""Everything CUDA-only that Megatron-Core touches on a machine without CUDA.

Megatron-Core 0.16.1 names CUDA in its source: `device="cuda"` in tensor factories,
`torch.cuda.current_device()`, type names such as `torch.cuda.FloatTensor`. `install` gives the
modules of Megatron a view of torch in which these mean the CPU; torch itself stays as it is for
everybody else, but for two methods of `Tensor` that cannot be reached another way. With CUDA it
does nothing.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

_FACTORIES = (
    *("tensor", "as_tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "eye"),
    *("rand", "randn", "randint", "zeros_like", "ones_like", "empty_like", "full_like"),
)
_CPU = torch.device("cpu")


def install() -> bool:
    """Make Megatron-Core run on the CPU; returns whether anything had to be done.

    Safe to call again: modules of Megatron that were imported since are covered too.
    """
    if torch.cuda.is_available():
        return False
    with _uncompiled():
        import megatron.core.dist_checkpointing.strategies.torch
        import megatron.core.distributed
        import megatron.core.models.gpt
        import megatron.core.optimizer
        import megatron.core.pipeline_parallel
        import megatron.core.tensor_parallel.random as megatron_random

    view = _torch_without_cuda()
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.core") and getattr(module, "torch", None) is torch:
            module.torch = view  # type: ignore[attr-defined]
    if getattr(torch.Tensor.cuda, "_is_cpu_backend", False):
        return True
    _patch_tensor_methods()
    _patch_random_state(megatron_random)
    _patch_distributed_optimizer(megatron.core.optimizer.distrib_optimizer.DistributedOptimizer)
    return True


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Megatron decorates functions with torch.compile while it is imported.

    On a CPU nothing of that pays, and torch's compiler is a third of all that is imported.
    """
    compile_function, torch.compile = torch.compile, _as_it_is
    try:
        yield
    finally:
        torch.compile = compile_function


def _as_it_is(function: Any = None, **options: Any) -> Any:
    return _as_it_is if function is None else function


class _View(types.ModuleType):
    """A module seen with some names replaced."""

    def __init__(self, module: types.ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(replaced)
        self.__dict__["_module"] = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def _torch_without_cuda() -> _View:
    factories = {name: _on_cpu(getattr(torch, name)) for name in _FACTORIES}
    return _View(torch, {**factories, "cuda": _View(torch.cuda, _cuda_names())})


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The tensor factory, with every CUDA device read as the CPU."""

    @functools.wraps(factory)
    def build(*args: Any, **kwargs: Any) -> torch.Tensor:
        device = kwargs.get("device")
        if isinstance(device, int) or (device is not None and torch.device(device).type == "cuda"):
            kwargs["device"] = _CPU
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return build


def _cuda_names() -> dict[str, Any]:
    """What Megatron asks of torch.cuda, answered by the CPU."""

    def nothing(*_args: Any, **_kwargs: Any) -> None:
        return None

    return {
        "current_device": lambda: _CPU,
        "synchronize": nothing,
        "empty_cache": nothing,
        "set_device": nothing,
        "get_rng_state": lambda *_args, **_kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *_args, **_kwargs: torch.set_rng_state(state),
        "manual_seed": torch.manual_seed,
        "Event": _Event,
        "Stream": _Stream,
        "current_stream": lambda *_args, **_kwargs: _Stream(),
        "default_stream": lambda *_args, **_kwargs: _Stream(),
        "stream": lambda _stream: contextlib.nullcontext(),
    }


class _Event:
    """A CUDA event on a device where everything has already happened."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.time = 0.0

    def record(self, *_args: Any) -> None:
        self.time = time.perf_counter()

    def synchronize(self) -> None: ...

    def wait(self, *_args: Any) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Event) -> float:
        return (other.time - self.time) * 1e3


class _Stream:
    """A CUDA stream on a device that has one order only."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None: ...

    def wait_stream(self, *_args: Any) -> None: ...

    def wait_event(self, *_args: Any) -> None: ...

    def record_event(self, *_args: Any) -> _Event:
        return _Event()

    def synchronize(self) -> None: ...


class _TypeName(str):
    """`torch.FloatTensor`, which Megatron's optimizers also know as `torch.cuda.FloatTensor`."""

    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or self.replace("torch.", "torch.cuda.", 1) == str(other)

    def __ne__(self, other: object) -> bool:
        return not self == other


def _patch_tensor_methods() -> None:
    original_type = torch.Tensor.type

    def cuda(self: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        return self

    def type_(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs:
            return original_type(self, *args, **kwargs)
        return _TypeName(original_type(self))

    cuda._is_cpu_backend = True  # type: ignore[attr-defined]
    torch.Tensor.cuda = cuda  # type: ignore[method-assign]
    torch.Tensor.type = type_  # type: ignore[method-assign]


def _patch_random_state(megatron_random: types.ModuleType) -> None:
    """Megatron's tracker of "CUDA" random states reads and writes the CPU generator."""
    megatron_random._get_cuda_rng_state = lambda *_args, **_kwargs: torch.get_rng_state()  # type: ignore[attr-defined]
    megatron_random._set_cuda_rng_state = (  # type: ignore[attr-defined]
        lambda state, *_args, **_kwargs: torch.set_rng_state(state)
    )


def _patch_distributed_optimizer(optimizer_class: Any) -> None:
    """torch's AdamW, Megatron's stand-in for TE's or apex's, keeps a `step` tensor per parameter.

    On load Megatron 0.16.1 shares one such tensor among all parameters, so that AdamW counts each
    step once for every parameter, and then asks the checkpoint for a `step` that it does not hold.
    """
    original = optimizer_class._set_main_param_and_optimizer_states

    def set_states(self: Any, model_param: torch.Tensor, tensors: dict[str, torch.Tensor]) -> None:
        group, order = self.model_param_group_index_map[model_param]
        state = self.optimizer.state[self.optimizer.param_groups[group]["params"][order]]
        if "step" in state:
            state["step"] = state["step"].clone()
            tensors = {"step": state["step"], **tensors}
        original(self, model_param, tensors)

    optimizer_class._set_main_param_and_optimizer_states = set_states
