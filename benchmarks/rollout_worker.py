"""A model that generates when asked: one process, or one of several stages. For bench_rollout.py.

Rank 0 reads a request as a line of JSON and answers with one; the others hear it from rank 0. All
of them sleep in between, so that several models can take turns on the same cores.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from nested_reft_mcore.bench.line_worker import LineWorker  # noqa: E402


class Model:
    """Our side: a model in `pipeline` processes with `threads` threads each."""

    def __init__(self, worker: LineWorker, layout: dict[str, Any]) -> None:
        self._worker = worker
        self.num_layers: int = layout["num_layers"]
        self.stage_of_layer: list[int] = layout["stage_of_layer"]
        self.vocab_size: int = layout["vocab_size"]

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        new_tokens: int,
        plan: str = "none",
        *,
        num_samples: int = 1,
        limits: Sequence[int] | None = None,
        max_slots: int = 64,
        batching: str = "continuous",
    ) -> dict[str, Any]:
        """One timed generation; the fields of `bench.generation.Timing`."""
        return self._worker.ask(
            {
                "prompts": prompts,
                "new_tokens": new_tokens,
                "plan": plan,
                "num_samples": num_samples,
                "limits": limits,
                "max_slots": max_slots,
                "batching": batching,
            }
        )


@contextmanager
def start_model(model: dict[str, str], pipeline: int, threads: int) -> Iterator[Model]:
    """`model` is `{"hf": DIR}` or `{"shape": SIZES}`."""
    port = str(20000 + (os.getpid() + 7919 * pipeline) % 20000)
    command = [sys.executable, __file__, json.dumps({**model, "pipeline": pipeline})]

    def environment(rank: int) -> dict[str, str]:
        return {
            "PYTHONPATH": str(REPOSITORY),
            "OMP_NUM_THREADS": str(threads),
            "OMP_WAIT_POLICY": "passive",
            "TORCHDYNAMO_DISABLE": "1",
            "RANK": str(rank),
            "WORLD_SIZE": str(pipeline),
            "LOCAL_RANK": str(rank),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }

    others = [
        subprocess.Popen(
            command,
            env={**os.environ, **environment(rank)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for rank in range(1, pipeline)
    ]
    try:
        with LineWorker(command, environment(0)) as first:
            yield Model(first, first.hear())
        for process in others:
            process.wait(20)
    finally:
        for process in others:
            process.kill()
            process.wait()


def serve(settings: dict[str, Any]) -> None:
    """One process: load the model, then answer until the input of rank 0 ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
    from nested_reft_mcore.bench.generation import Generator
    from nested_reft_mcore.config.bench import BenchRolloutOptions
    from nested_reft_mcore.config.schema import ParallelConfig
    from nested_reft_mcore.data.prompt import Prompt
    from nested_reft_mcore.launch.ranks import discover_ranks
    from nested_reft_mcore.mcore.agreement import on_main
    from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
    from nested_reft_mcore.training.policy_setup import load_policy

    ranks = discover_ranks(os.environ)
    assert ranks is not None
    parallel = ParallelConfig(pipeline_model_parallel_size=settings.pop("pipeline"))
    options = BenchRolloutOptions(**settings, parallel=parallel)
    context = initialize_parallel(parallel, ranks, seed=0)
    policy = load_policy(options.model(), parallel, context)
    generator = Generator(policy)
    num_layers = policy.architecture.num_layers

    def answer(content: dict[str, Any]) -> None:
        if context.is_main:
            print(json.dumps(content), file=answers)

    layout = {"num_layers": num_layers, "stage_of_layer": policy.stage_of_layer}
    answer({**layout, "vocab_size": policy.architecture.vocab_size})
    while line := on_main(sys.stdin.readline, context):
        request = json.loads(line)
        limits = request["limits"] or [None] * len(request["prompts"])
        prompts = [
            Prompt(tuple(ids), "", max_new_tokens=limit)
            for ids, limit in zip(request["prompts"], limits, strict=True)
        ]
        timing = generator.run(
            prompts,
            request["num_samples"],
            request["new_tokens"],
            LayerSkipPlan.parse(request["plan"], num_layers),
            max_slots=request["max_slots"],
            batching=request["batching"],
        )
        answer(asdict(timing))
    shutdown()


if __name__ == "__main__":
    serve(json.loads(sys.argv[1]))
