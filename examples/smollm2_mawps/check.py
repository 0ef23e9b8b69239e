"""What run.sh proves: our stack computes what transformers computes, before and after training.

`before` compares the converted checkpoint with the Hugging Face directory that it came from;
`after` looks at the rollouts and the export of the run. Each line says what was found; the exit
code is 1 if one of them failed.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.algorithm.skip_schedule import LayerSkipSchedule
from nested_reft_mcore.config.load import load_config
from nested_reft_mcore.config.nested import num_skipped
from nested_reft_mcore.config.schema import Config, ModelConfig, ParallelConfig
from nested_reft_mcore.launch.context import ParallelContext, RankInfo
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.mcore.model import Policy, stage_of_layer
from nested_reft_mcore.rollout.dump import load_rollouts
from nested_reft_mcore.training.policy_setup import load_policy

NUM_PROMPTS = 8
MAX_NEW_TOKENS = 64
TOLERANCE = 1e-4
"""Largest allowed difference of a float32 logit or log-probability."""
MIN_EFFECT = 1.0
"""Skipping moves some logit at least so far; less would mean that nothing was skipped."""


class Checks:
    """Prints every finding and remembers whether one was bad."""

    def __init__(self) -> None:
        self.num_failed = 0

    def __call__(self, is_good: bool, finding: str) -> None:
        """Print one finding."""
        self.num_failed += not is_good
        print(f"check {'ok    ' if is_good else 'FAILED'} {finding}", flush=True)

    def same(self, what: str, ours: Tensor, theirs: Tensor) -> None:
        """Compare two tensors, NaN being different from everything."""
        difference = (ours - theirs).abs().max().item()
        found = f"largest difference {difference:.1e}, allowed below {TOLERANCE:.0e}"
        self(difference < TOLERANCE, f"{what}: {found}")


def main() -> None:
    """Parse the command line, check, and leave with 1 if something failed."""
    parser = argparse.ArgumentParser(description="Compare the example's steps with transformers.")
    parser.add_argument("when", choices=("before", "after"), help="the training run")
    parser.add_argument("config", type=Path, help="the run's configuration")
    parser.add_argument("--hf", type=Path, required=True, help="the model before it")
    arguments = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    config = load_config(arguments.config)
    checks = Checks()
    with torch.inference_mode(), single_process() as context:
        (check_before if arguments.when == "before" else check_after)(
            config, arguments.hf, context, checks
        )
    sys.exit(1 if checks.num_failed else 0)


def check_before(config: Config, hf: Path, context: ParallelContext, checks: Checks) -> None:
    """Greedy completions at one and two stages, then logits under the run's first plans."""
    model = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    prompts, requests = chats(config, hf)
    expected = [complete(model, prompt) for prompt in prompts]
    for num_stages in (1, 2):
        check_completions(config, num_stages, requests, prompts, expected, checks)
    sequences = [torch.tensor([a + b]) for a, b in zip(prompts, expected, strict=True)]
    policy = load_policy(config.model, ParallelConfig(), context)
    everything = LayerSkipPlan.full(policy.architecture.num_layers)
    for step, plan in enumerate([everything, *plans(config, policy)]):
        sequence = sequences[step % len(sequences)]
        with policy.nested(plan):
            ours = logits(policy, sequence)
        with only_active_layers(model, plan):
            theirs = model(sequence, use_cache=False).logits
        size = f"{sequence.shape[1]} x {theirs.shape[2]} logits"
        if not plan.skipped:
            checks.same(f"{size} of all layers", ours, theirs)
            continue
        effect = (theirs - model(sequence, use_cache=False).logits).abs().max().item()
        checks.same(f"{size} without layers {plan.describe()}", ours, theirs)
        if effect < MIN_EFFECT:
            checks(False, f"without layers {plan.describe()} logits move by {effect:.1e} only")


def check_after(config: Config, hf: Path, context: ParallelContext, checks: Checks) -> None:
    """The first step's behavior log-probabilities, then the exported directory."""
    run = Path(config.run_dir)
    start: Any = LlamaForCausalLM.from_pretrained(hf, dtype=torch.float32).eval()
    batch, _ = load_rollouts(run, 0)
    ours, theirs = [], []
    with only_active_layers(start, batch.plan):
        for rollout in batch.rollouts:
            ours.append(torch.tensor(rollout.behavior_logprobs))
            theirs.append(
                logprobs(
                    start,
                    rollout.prompt.token_ids,
                    rollout.token_ids,
                    config.rollout.temperature,
                )
            )
    what = f"{sum(map(len, ours))} behavior log-probs of step 1, {batch.plan.describe()} skipped"
    checks.same(what, torch.cat(ours), torch.cat(theirs))
    loaded: Any = LlamaForCausalLM.from_pretrained(run / "hf", output_loading_info=True)
    exported, report = loaded
    wrong = {kind: names for kind, names in report.items() if names}
    num_tensors = len(list(exported.named_parameters()))
    checks(
        not wrong,
        f"transformers loads {run / 'hf'}: {num_tensors} tensors, "
        + (f"but {wrong}" if wrong else "none missing, none unexpected"),
    )
    policy = load_policy(
        ModelConfig(checkpoint=str(run / "checkpoints")), ParallelConfig(), context
    )
    rollout = batch.rollouts[0]
    sequence = torch.tensor([rollout.prompt.token_ids + rollout.token_ids])
    theirs = exported.eval()(sequence, use_cache=False).logits
    checks.same("logits of checkpoint and export", logits(policy, sequence), theirs)
    moved = (theirs - start(sequence, use_cache=False).logits).abs().max().item()
    checks(moved > 0, f"training moved the logits, by at most {moved:.1e}")


def chats(config: Config, hf: Path) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """The first held-out questions: token ids as transformers makes them, and requests of ours."""
    data = config.data
    assert data.eval_path is not None, "the example's configuration has held-out prompts"
    tokenizer = AutoTokenizer.from_pretrained(hf)
    lines = Path(data.eval_path).read_text(encoding="utf-8").splitlines()[:NUM_PROMPTS]
    prompts, requests = [], []
    for line in lines:
        question = json.loads(line)[data.prompt_field] + data.prompt_suffix
        messages = [{"role": "user", "content": question}]
        if data.system_prompt is not None:
            messages.insert(0, {"role": "system", "content": data.system_prompt})
        encoded = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
        prompts.append(list(encoded))
        requests.append({"messages": messages})
    return prompts, requests


def complete(model: Any, prompt: Sequence[int]) -> list[int]:
    """The greedy completion by transformers' own generate; one at a time, so nothing is padded."""
    tokens = torch.tensor([prompt])
    output = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=MAX_NEW_TOKENS,
    )
    return output[0, len(prompt) :].tolist()


def check_completions(
    config: Config,
    num_stages: int,
    requests: Sequence[dict[str, Any]],
    prompts: Sequence[list[int]],
    expected: Sequence[list[int]],
    checks: Checks,
) -> None:
    """Compare what `nested-reft generate --greedy` writes, token for token."""
    with tempfile.TemporaryDirectory() as scratch:
        source, output = Path(scratch) / "prompts.jsonl", Path(scratch) / "completions.jsonl"
        source.write_text("".join(json.dumps(one) + "\n" for one in requests), encoding="utf-8")
        command = ["generate", "--checkpoint", str(config.model.checkpoint), "--greedy"]
        command += ["--prompts", str(source), "--output", str(output)]
        command += ["--max-new-tokens", str(MAX_NEW_TOKENS)]
        command += ["--pipeline-parallel", str(num_stages)]
        subprocess.run(
            [sys.executable, "-m", "nested_reft_mcore", *command],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        found = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    where = f"{len(prompts)} greedy completions on {num_stages} pipeline stage(s)"
    same_prompts = [one["prompt_token_ids"] for one in found] == list(prompts)
    checks(same_prompts, f"{where}: the chat template gives the same prompts")
    differing = [
        f"prompt {index} from token {first_difference(one['token_ids'], other)} on"
        for index, (one, other) in enumerate(zip(found, expected, strict=True))
        if one["token_ids"] != other
    ]
    num_tokens = sum(map(len, expected))
    checks(
        not differing,
        f"{where}: {num_tokens} tokens, "
        + (f"different: {', '.join(differing)}" if differing else "all as transformers'"),
    )


def first_difference(one: Sequence[int], other: Sequence[int]) -> int:
    """The first place where two sequences differ, or where the shorter one ends."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def plans(config: Config, policy: Policy) -> list[LayerSkipPlan]:
    """The plans that the run will draw, at its number of stages."""
    num_layers = policy.architecture.num_layers
    schedule = LayerSkipSchedule(
        law=config.nested.law,
        num_layers=num_layers,
        num_skipped=num_skipped(config.nested, num_layers),
        border_layers=config.nested.border_layers,
        part=config.nested.part,
        stage_of_layer=stage_of_layer(
            num_layers, config.parallel.pipeline_model_parallel_size, num_chunks=1
        ),
        seed=config.seed,
    )
    return [schedule.plan(step) for step in range(config.train.num_steps)]


def logits(policy: Policy, sequence: Tensor) -> Tensor:
    """`[1, seq, vocab]` float32 of the policy as it stands, on this one process."""
    positions = torch.arange(sequence.shape[1])[None]
    output = policy.chunks[0](sequence, positions, None)
    return output[..., : policy.architecture.vocab_size].float()


def logprobs(
    model: Any, prompt: Sequence[int], completion: Sequence[int], temperature: float
) -> Tensor:
    """`[len(completion)]` log-probabilities by transformers."""
    sequence = torch.tensor([[*prompt, *completion]])
    scores = model(sequence, use_cache=False).logits[0, len(prompt) - 1 : -1] / temperature
    labels = sequence[0, len(prompt) :, None]
    return scores.log_softmax(dim=-1).gather(1, labels)[:, 0]


@contextmanager
def only_active_layers(model: Any, plan: LayerSkipPlan) -> Iterator[None]:
    """A transformers model with the plan's layers deleted, as long as the context lasts."""
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList([layers[layer] for layer in plan.active])
    # transformers runs as many layers as its configuration names.
    num_layers, model.config.num_hidden_layers = model.config.num_hidden_layers, len(plan.active)
    try:
        yield
    finally:
        model.model.layers, model.config.num_hidden_layers = layers, num_layers


@contextmanager
def single_process() -> Iterator[ParallelContext]:
    """Megatron's groups for this process alone."""
    threads = int(os.environ.get("OMP_NUM_THREADS", "1"))
    torch.set_num_threads(threads)
    context = initialize_parallel(
        ParallelConfig(), RankInfo(0, 1, 0, 1, "127.0.0.1", 0, "single"), seed=0
    )
    try:
        yield context
    finally:
        shutdown()


if __name__ == "__main__":
    main()
