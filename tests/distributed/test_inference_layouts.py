"""What generate and score write does not depend on replicas or sequence parallelism."""

from pathlib import Path

import pytest
from inference_cases import PROMPT_LINES, read_lines, run_inference, write_lines
from inference_cases import write_model_with_tokenizer as write_model
from run_workers import run_workers

from nested_reft_mcore.config.inference import GenerateOptions, ScoreOptions

SEQUENCE_PARALLEL = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


@pytest.mark.distributed
def test_replicas_share_prompts_and_completions(tmp_path: Path):
    hf = str(tmp_path / "model")
    write_model(Path(hf))
    many = write_lines(tmp_path / "many.jsonl", PROMPT_LINES)
    # One prompt for two replicas: one of them has nothing to do.
    one = write_lines(tmp_path / "one.jsonl", PROMPT_LINES[:1])

    def jobs(name: str, sizes: dict) -> list:
        sampled, scored = str(tmp_path / f"{name}.jsonl"), str(tmp_path / f"{name}-scores.jsonl")
        generate = GenerateOptions(
            hf=hf,
            prompts=str(many),
            output=sampled,
            logprobs=True,
            skip_layers="2",
            # Two completions at once: several chunks.
            num_samples=2,
            max_slots=2,
            max_new_tokens=10,
            seed=4,
        )
        alone = {"prompts": str(one), "output": str(tmp_path / f"{name}-one.jsonl")}
        score = ScoreOptions(hf=hf, input=sampled, output=scored, skip_layers="2", batch_size=2)
        return [(sizes, generate), (sizes, generate.model_copy(update=alone)), (sizes, score)]

    run_workers(run_inference, 1, jobs("single", {}))
    run_workers(run_inference, 2, jobs("dp2", {}) + jobs("sp2", SEQUENCE_PARALLEL))
    for kind, num_lines in (("", 12), ("-one", 2), ("-scores", 12)):
        expected = read_lines(tmp_path / f"single{kind}.jsonl")
        assert len(expected) == num_lines
        for layout in ("dp2", "sp2"):
            found = read_lines(tmp_path / f"{layout}{kind}.jsonl")
            assert len(found) == num_lines
            for line, other in zip(found, expected, strict=True):
                assert line.pop("logprobs") == pytest.approx(other["logprobs"], abs=1e-5)
                assert line.items() < other.items()
