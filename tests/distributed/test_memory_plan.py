"""The memory model beside real updates: bytes of real tensors, and what the process grew by."""

from __future__ import annotations

from typing import Any

import pytest
from memory_worker import measure_update
from run_workers import run_workers

from nested_reft_mcore.config.load import config_from_dict
from nested_reft_mcore.mcore import logprobs
from nested_reft_mcore.planning import generation_memory, workload
from nested_reft_mcore.planning.layout import Layout
from nested_reft_mcore.planning.memory import RankMemory, rank_memory
from nested_reft_mcore.rollout import memory

TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
ROOM = 10**12
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {
        "model": {"dtype": "bfloat16"},
        "parallel": {TP: 2, "sequence_parallel": True},
        "train": {"micro_batch_size": 4},
    },
    "pp2": {
        "parallel": {PP: 2},
        "train": {"micro_batch_size": 1},
        # As many layers as fill two processes, and more micro-batches than stages.
        "rollout": {"prompts_per_step": 3, "group_size": 1},
    },
    "dp2": {
        "optimizer": {"use_distributed_optimizer": True},
        "train": {"micro_batch_size": 2},
    },
}
NUM_LAYERS = {"tp2": 9, "pp2": 10, "dp2": 5}


def configuration(name: str) -> dict[str, Any]:
    """Seconds of computing: what is large is the model, not the number of tokens."""
    changes = LAYOUTS[name]
    architecture = {
        "num_layers": NUM_LAYERS[name],
        "hidden_size": 512,
        "num_attention_heads": 8,
        "num_query_groups": 4,
        "ffn_hidden_size": 2048,
        "vocab_size": 8000,
        "untie_embeddings_and_output_weights": True,
    }
    batch = {"prompts_per_step": 2, "group_size": 2, "max_new_tokens": 97, "mode": "full"}
    return {
        "run_dir": "unused",
        "model": {"architecture": architecture} | changes.get("model", {}),
        "parallel": changes.get("parallel", {}),
        "data": {"max_prompt_length": 96},
        "rollout": batch | changes.get("rollout", {}),
        "optimizer": changes.get("optimizer", {}),
        "train": changes["train"],
    }


def predicted(name: str, stage: int) -> RankMemory:
    config = config_from_dict(configuration(name))
    assert config.model.architecture is not None
    layout = Layout.of(config.model.architecture, config.parallel, nodes=1, gpus_per_node=2)
    return rank_memory(config, layout, stage, ROOM, "cpu")


@pytest.mark.distributed
@pytest.mark.parametrize("name", LAYOUTS)
def test_predicted_bytes_are_those_of_real_updates(name: str) -> None:
    for found in run_workers(measure_update, 2, configuration(name), timeout=550):
        plan = predicted(name, found["stage"])
        for kind in ("weights", "gradients", "optimizer"):
            assert getattr(plan.static, kind) == pytest.approx(found[kind], rel=0.02), kind
        assert found["growth"] >= 400e6
        total = plan.static.total + plan.update.total
        assert total == pytest.approx(found["growth"], rel=0.15)
        # What is always there is known to the byte, so all the error is in the rest.
        dynamic = found["growth"] - plan.static.total
        assert plan.update.total == pytest.approx(dynamic, rel=0.25)


def test_numbers_that_other_rooms_have_too():
    assert workload.MOST_SLOTS == memory.MOST_SLOTS
    assert generation_memory._SHARE_OF_FREE == memory._SHARE_OF_FREE
    assert workload._CHUNK_BYTES == logprobs._CHUNK_BYTES
