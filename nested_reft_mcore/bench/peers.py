"""Others that generate from the same weights: transformers in this process, vLLM in its own."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import torch

from nested_reft_mcore.bench import vllm_worker
from nested_reft_mcore.bench.line_worker import LineWorker, WorkerFailed
from nested_reft_mcore.config.bench import PeerName

_VLLM_START_SECONDS = 900.0


class PeerUnavailable(Exception):
    """A peer is not installed, does not start or does not do what was asked; says why."""


class Peer(Protocol):
    """Somebody else's generation."""

    name: PeerName
    version: str

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Seconds for `new_tokens` sampled tokens after every prompt. Raises PeerUnavailable."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class TransformersPeer:
    """`generate` of transformers with scaled-dot-product attention, sampling at temperature 1."""

    name: PeerName = "transformers"

    def __init__(
        self, directory: Path, dtype: torch.dtype, device: torch.device, num_threads: int
    ) -> None:
        """`num_threads`: what it may use while it generates. Raises PeerUnavailable."""
        try:
            from transformers import AutoModelForCausalLM, GenerationConfig

            model: Any = AutoModelForCausalLM.from_pretrained(
                directory, dtype=dtype, attn_implementation="sdpa"
            )
        # Whatever it is, it is the reason that the table gives.
        except Exception as error:
            raise PeerUnavailable(_first_line(error)) from error
        self.version = metadata.version("transformers")
        self._device = device
        self._num_threads = num_threads
        self._model: Any = model.to(device).eval()
        # What the model's own configuration says would be filled in where a call leaves it out.
        self._model.generation_config = GenerationConfig()

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Seconds for `new_tokens` sampled tokens after every prompt. Raises PeerUnavailable."""
        tokens = torch.tensor(prompts, device=self._device)
        threads_before = torch.get_num_threads()
        torch.set_num_threads(self._num_threads)
        try:
            started = time.perf_counter()
            with torch.inference_mode():
                found = self._model.generate(
                    tokens,
                    attention_mask=torch.ones_like(tokens),
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    top_p=1.0,
                    max_new_tokens=new_tokens,
                    pad_token_id=0,
                )
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            seconds = time.perf_counter() - started
        except (RuntimeError, ValueError) as error:
            raise PeerUnavailable(_first_line(error)) from error
        finally:
            torch.set_num_threads(threads_before)
        _check_tokens(found.shape[0] * (found.shape[1] - tokens.shape[1]), prompts, new_tokens)
        return seconds

    def close(self) -> None:
        """Free the weights."""
        self._model = None


class VllmPeer:
    """vLLM, eager, in the environment of another interpreter; idle between two runs."""

    name: PeerName = "vllm"

    def __init__(
        self,
        python: str,
        directory: Path,
        dtype: str,
        num_threads: int,
        *,
        max_sequences: int,
        max_length: int,
        kv_gigabytes: int,
    ) -> None:
        """Starts it and waits until the weights are loaded. Raises PeerUnavailable.

        `kv_gigabytes`: room for keys and values, which vLLM takes at once, on a CPU.
        """
        settings = {
            "model": str(directory),
            "dtype": dtype,
            "max_sequences": max_sequences,
            "max_length": max_length,
            "kv_gigabytes": kv_gigabytes,
        }
        try:
            self._worker = _start_vllm(python, settings, num_threads)
        except WorkerFailed as error:
            raise PeerUnavailable(str(error)) from error
        try:
            self.version = str(self._worker.hear(_VLLM_START_SECONDS)["version"])
        except WorkerFailed as error:
            self._worker.close()
            raise PeerUnavailable(str(error)) from error

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> float:
        """Seconds for `new_tokens` sampled tokens after every prompt. Raises PeerUnavailable."""
        request = {"prompts": [list(ids) for ids in prompts], "new_tokens": new_tokens}
        try:
            answer = self._worker.ask(request)
        except WorkerFailed as error:
            raise PeerUnavailable(str(error)) from error
        _check_tokens(answer["tokens"], prompts, new_tokens)
        return float(answer["seconds"])

    def close(self) -> None:
        """End its process."""
        self._worker.close()


def _start_vllm(python: str, settings: dict[str, Any], num_threads: int) -> LineWorker:
    """The worker's process, its model not yet loaded. Raises WorkerFailed."""
    command = [python, vllm_worker.__file__, json.dumps(settings)]
    environment = {
        "OMP_NUM_THREADS": str(num_threads),
        "OMP_WAIT_POLICY": "passive",
        # Its environment is another one: ours must not be found there.
        "PYTHONPATH": "",
    }
    return LineWorker(command, environment)


def _check_tokens(found: int, prompts: Sequence[Sequence[int]], new_tokens: int) -> None:
    if found != len(prompts) * new_tokens:
        raise PeerUnavailable(
            f"generated {found} tokens where {len(prompts)} x {new_tokens} were asked for"
        )


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
