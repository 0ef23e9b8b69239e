"""A tiny model with a tokenizer in a directory, and what transformers makes of it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from hf_cases import NUM_LAYERS, VOCAB_SIZE, HfCase, write_model
from megatron.core import parallel_state
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from nested_reft_mcore.algorithm.layer_skip import LayerSkipPlan
from nested_reft_mcore.config.inference import GenerateOptions, ScoreOptions
from nested_reft_mcore.config.schema import ParallelConfig
from nested_reft_mcore.launch.context import RankInfo
from nested_reft_mcore.mcore.initialize import initialize_parallel, shutdown
from nested_reft_mcore.training.inference import generate_file, score_file

END = 7
"""End of sequence."""
CHAT_TEMPLATE = (
    "{% for message in messages %}w1 {{ message['content'] }} w2{% endfor %}"
    "{% if add_generation_prompt %} w3{% endif %}"
)
PROMPT_LINES = (
    {"prompt": "w13 w4 w5"},
    {"messages": [{"role": "user", "content": "w9 w8"}]},
    {"prompt_token_ids": [11, 12, 13, 14, 15, 16]},
    {"prompt": "w40", "answer": 3},
    {"prompt_token_ids": [30, 0, 30]},
    {"prompt": "w6 w6"},
)
PROMPTS = ([13, 4, 5], [1, 9, 8, 2, 3], [11, 12, 13, 14, 15, 16], [40], [30, 0, 30], [6, 6])
"""Token ids of these lines where the template is `none`."""


def write_model_with_tokenizer(directory: Path) -> None:
    """A random Llama, and a tokenizer whose words are `w0`, `w1`, ..."""
    write_model(HfCase("llama", untied=False), directory)
    words = {"<end>" if i == END else f"w{i}": i for i in range(VOCAB_SIZE)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(directory)


def write_lines(path: Path, lines: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def reference_model(directory: Path, skipped: str = "") -> PreTrainedModel:
    """The model in transformers; skipped parts add nothing to the residual stream."""
    model = AutoModelForCausalLM.from_pretrained(directory).eval()
    plan = LayerSkipPlan.parse(skipped, NUM_LAYERS)
    with torch.no_grad():
        for index, layer in enumerate(model.model.layers):
            if plan.skips_attention(index):
                layer.self_attn.o_proj.weight.zero_()
            if plan.skips_mlp(index):
                layer.mlp.down_proj.weight.zero_()
    return model


def greedy_completion(model: PreTrainedModel, prompt: list[int], max_new_tokens: int) -> list[int]:
    """What transformers' own generation gives."""
    tokens = torch.tensor([prompt])
    found = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=END,
        pad_token_id=END,
    )
    return found[0, len(prompt) :].tolist()


def completion_logits(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    """`[completion, vocab]`: what each token of the completion was chosen from."""
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0].float()
    return logits[len(prompt) - 1 : -1]


def reference_logprobs(
    model: PreTrainedModel, prompt: list[int], completion: list[int]
) -> list[float]:
    """Log-probabilities of the completion's tokens at temperature 1."""
    logprobs = completion_logits(model, prompt, completion).log_softmax(-1)
    return logprobs.gather(-1, torch.tensor(completion)[:, None])[:, 0].tolist()


def run_inference(
    ranks: RankInfo,
    jobs: Sequence[tuple[dict[str, Any], GenerateOptions | ScoreOptions]],
) -> None:
    """Run each job at the parallel sizes that stand before it, one after the other."""
    for sizes, options in jobs:
        parallel = ParallelConfig(**sizes)
        context = initialize_parallel(parallel, ranks, seed=0)
        options = options.model_copy(update={"parallel": parallel})
        if isinstance(options, GenerateOptions):
            generate_file(options, context)
        else:
            score_file(options, context)
        parallel_state.destroy_model_parallel()
    shutdown()
