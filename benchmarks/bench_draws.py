"""How many draws another layout's rounding changes, and what a draw costs: samplers compared.

Another layout adds the same products in another order, so its logits differ by rounding. With the
same uniform numbers a draw should change only where it must. Two kinds of logits:

- drawn ones, for several vocabularies: `hidden @ weights.T` of normal numbers, with a deviation of
  3 (peaked: the likeliest of 49,152 tokens has some percent). "other order" adds the products in
  two halves, as tensor parallelism does; "noise r" adds normal noise of r times the deviation of
  the logits, which is what many layers make of rounding (r is 1e-6 to 1e-5 in float32).
- with --hf, those of a real model on the text of this repository, computed again with the products
  of `o_proj` and `down_proj` of every layer added in two halves.

python benchmarks/bench_draws.py [--draws 20000] [--hf DIRECTORY] [--output FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nested_reft_mcore.algorithm import counter_random
from nested_reft_mcore.rollout.sampling import sample_tokens
from nested_reft_mcore.rollout.types import SamplingParams

REPOSITORY = Path(__file__).resolve().parents[1]
VOCABULARIES = (64, 512, 8192, 49_152)
HIDDEN, DEVIATION, DRAWS_PER_CONTEXT, CHUNK = 512, 3.0, 20, 40
Sampler = Callable[[Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=20_000, help="ten times as many up to 512 ids")
    parser.add_argument("--hf", type=Path, help="a model whose logits to use as well")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--output", type=Path, default=Path("bench_draws.json"))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for vocab_size in VOCABULARIES:
        num_draws = options.draws * (10 if vocab_size <= 512 else 1)
        logits, others = drawn_logits(vocab_size, num_draws // DRAWS_PER_CONTEXT)
        rows += count_changes(f"drawn, {vocab_size}", logits, others, num_draws)
    if options.hf is not None:
        logits, others = real_logits(options.hf, options.draws // DRAWS_PER_CONTEXT)
        rows += count_changes(f"real, {logits.shape[1]}", logits, others, options.draws)
    times = measure_times(options.rounds)
    report = {
        "what": "bench_draws",
        "commit": git("rev-parse", "--short", "HEAD"),
        "changed": bool(git("status", "--porcelain", "--untracked-files=no")),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "rows": rows,
        "milliseconds_16x49152": times,
    }
    show(report)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(f"{options.output}: written")


def drawn_logits(vocab_size: int, num_contexts: int) -> tuple[Tensor, dict[str, Tensor]]:
    """`[contexts, vocab]`, and the same with other rounding, by the name of what was done."""
    generator = torch.Generator().manual_seed(vocab_size)
    hidden = torch.randn(num_contexts, HIDDEN, generator=generator)
    weights = torch.randn(vocab_size, HIDDEN, generator=generator) * (DEVIATION / HIDDEN**0.5)
    logits = hidden @ weights.T
    half = HIDDEN // 2
    others = {"other order": hidden[:, :half] @ weights[:, :half].T}
    others["other order"] += hidden[:, half:] @ weights[:, half:].T
    return logits, others | noisy(logits, generator)


def noisy(logits: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    noise = torch.randn(logits.shape, generator=generator) * logits.std()
    return {f"noise {size:.0e}": logits + size * noise for size in (1e-6, 1e-5)}


def real_logits(directory: Path, num_contexts: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits of a Hugging Face model at every position of some text, computed in two ways."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    text = (REPOSITORY / "README.md").read_text() + (REPOSITORY / "CONTRIBUTING.md").read_text()
    ids = AutoTokenizer.from_pretrained(directory)(text)["input_ids"]
    length = min(num_contexts, 250)
    ids = torch.tensor(ids[: num_contexts // length * length]).view(-1, length)

    def forward() -> Tensor:
        with torch.inference_mode():
            return torch.cat([model(row[None]).logits[0] for row in ids])

    logits = forward()
    for name, module in model.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            module.forward = in_halves(module.weight)
    others = {"other order": forward()}
    return logits, others | noisy(logits, torch.Generator().manual_seed(0))


def in_halves(weight: Tensor) -> Callable[[Tensor], Tensor]:
    half = weight.shape[1] // 2
    left, right = weight[:, :half], weight[:, half:]
    return lambda hidden: hidden[..., :half] @ left.T + hidden[..., half:] @ right.T


def count_changes(
    name: str, logits: Tensor, others: dict[str, Tensor], num_draws: int
) -> list[dict[str, Any]]:
    """Draw every context's tokens from all of them; changed draws in 10,000."""
    num_draws = min(num_draws, len(logits) * DRAWS_PER_CONTEXT)
    changed = {other: dict.fromkeys(SAMPLERS, 0) for other in others}
    for start in range(0, num_draws, CHUNK):
        draws = torch.arange(start, min(start + CHUNK, num_draws))
        context = draws // DRAWS_PER_CONTEXT
        for sampler, sample in SAMPLERS.items():
            expected = sample(logits[context], draws)
            for other, values in others.items():
                changed[other][sampler] += int((sample(values[context], draws) != expected).sum())
    entropy = torch.distributions.Categorical(logits=logits).entropy().mean().item()
    return [
        {
            "logits": name,
            "entropy": entropy,
            "perturbed": other,
            "rms_change": (values - logits).square().mean().sqrt().item(),
            "draws": num_draws,
            "changed_in_10000": {key: n / num_draws * 1e4 for key, n in changed[other].items()},
        }
        for other, values in others.items()
    ]


def uniforms(draws: Tensor) -> Tensor:
    return counter_random.uniforms(int(counter_random.Stream.SAMPLING), 0, draws)


def naive(logits: Tensor, draws: Tensor) -> Tensor:
    """Inverse CDF with a float32 cumulative sum over the whole vocabulary."""
    ends = logits.softmax(dim=1).cumsum(dim=1)
    target = uniforms(draws).float()[:, None] * ends[:, -1:]
    return torch.searchsorted(ends, target, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


def exact(logits: Tensor, draws: Tensor) -> Tensor:
    """Inverse CDF in float64 throughout: what is left is owed to the logits alone."""
    ends = logits.double().softmax(dim=1).cumsum(dim=1)
    target = uniforms(draws)[:, None] * ends[:, -1:]
    return torch.searchsorted(ends, target, right=True)[:, 0].clamp_(max=logits.shape[1] - 1)


def two_levels(logits: Tensor, draws: Tensor) -> Tensor:
    """Inverse CDF over blocks of 128 ids, then inside one: float32 within blocks, else float64."""
    blocks = torch.nn.functional.pad(logits, (0, -logits.shape[1] % 128), value=-torch.inf)
    blocks = (blocks - logits.amax(dim=1)[:, None]).exp_().view(len(logits), -1, 128)
    ends = blocks.sum(dim=2).cumsum(dim=1, dtype=torch.float64)
    target = uniforms(draws)[:, None] * ends[:, -1:]
    block = torch.searchsorted(ends, target, right=True).clamp_(max=ends.shape[1] - 1)
    begin = torch.where(block > 0, ends.gather(1, (block - 1).clamp_(min=0)), 0.0)
    inside = blocks[torch.arange(len(logits)), block[:, 0]].cumsum(dim=1, dtype=torch.float64)
    column = torch.searchsorted(inside, target - begin, right=True).clamp_(max=127)
    return (block * 128 + column)[:, 0]


def ours(logits: Tensor, draws: Tensor) -> Tensor:
    tokens, _ = sample_tokens(
        logits, uniforms(draws), SamplingParams(1), vocab_start=0, vocab_size=logits.shape[1]
    )
    return tokens


def gumbel_max(logits: Tensor, draws: Tensor) -> Tensor:
    """The largest logit after adding Gumbel noise that is a function of draw and id."""
    return (logits.double() + gumbel(int(draws[0]), len(draws), logits.shape[1])).argmax(dim=1)


@lru_cache(maxsize=1)
def gumbel(first: int, num_draws: int, width: int) -> Tensor:
    noise = counter_random.uniforms(
        9, 0, first + torch.arange(num_draws)[:, None], torch.arange(width)
    )
    return noise.log_().neg_().log_().neg_()


SAMPLERS: dict[str, Sampler] = {
    "CDF float32": naive,
    "CDF two levels": two_levels,
    "CDF float64": exact,
    "Gumbel": gumbel_max,
    "ours": ours,
}


def measure_times(rounds: int) -> dict[str, float]:
    """Milliseconds of a call for 16 rows of 49,152 ids, medians of interleaved rounds."""
    logits = torch.randn(16, 49_152, generator=torch.Generator().manual_seed(0)) * DEVIATION
    draws = torch.arange(16)
    times: dict[str, list[float]] = {name: [] for name in SAMPLERS}
    for _ in range(rounds + 2):
        for name, sample in SAMPLERS.items():
            gumbel.cache_clear()
            started = time.perf_counter()
            sample(logits, draws)
            times[name].append((time.perf_counter() - started) * 1e3)
    return {name: statistics.median(values[2:]) for name, values in times.items()}


def show(report: dict[str, Any]) -> None:
    names = list(SAMPLERS)
    print("draws that change, in 10,000")
    print(
        f"{'logits':<14} {'entropy':>7} {'perturbed':<12} {'rms':>8} {'draws':>8}", *names, sep="  "
    )
    for row in report["rows"]:
        counts = [f"{row['changed_in_10000'][name]:>{len(name)}.2f}" for name in names]
        print(
            f"{row['logits']:<14} {row['entropy']:>7.2f} {row['perturbed']:<12} "
            f"{row['rms_change']:>8.1e} {row['draws']:>8}",
            *counts,
            sep="  ",
        )
    print("milliseconds for 16 x 49,152, median:")
    for name, milliseconds in report["milliseconds_16x49152"].items():
        print(f"  {name:<16} {milliseconds:8.2f}")


def git(*arguments: str) -> str:
    command = ["git", "-C", str(REPOSITORY), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
