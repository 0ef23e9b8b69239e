"""Scores of tokens chunk by chunk against whole logits: peak memory and time, forward and backward.

From hidden states `[tokens, hidden]` and an output matrix `[vocab, hidden]` to the log-probability
of each label and the entropy of its distribution, and back to both gradients.

- whole: logits, `float()`, `log_softmax`, `gather` and the entropy, with torch's autograd;
- chunked: `mcore.logprobs.token_logprobs`, which makes logits twice and keeps none.

The loss is the sum of the log-probs; with `--loss entropy` also of the entropies, else those are
made without a gradient, as a metric. Every run is a process of its own: its extra memory is the
peak of what is resident during the pass, above what is resident before it, or what torch's
allocator says on CUDA. Arms take turns, every other round backwards; medians over rounds.

python benchmarks/bench_logprobs.py [--tokens 4096] [--vocab 151936] [--hidden 896] [--loss entropy]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nested_reft_mcore.bench.rounds import run_rounds
from nested_reft_mcore.observability.environment import environment_report

MIB = 2**20
ARMS = ("whole", "chunked")
NORMS = ("logprobs", "entropies", "hidden_gradient", "weight_gradient")
"""Norms that both arms have to agree on."""


def main() -> None:
    options = parse()
    if options.arm is not None:
        print(json.dumps(measure(options)))
        return
    runs = run_rounds(
        {arm: lambda arm=arm: in_a_process(arm) for arm in ARMS},
        options.rounds,
        lambda done: print(f"{done} of {options.rounds * len(ARMS)} runs", file=sys.stderr),
    )
    medians = {
        arm: {name: statistics.median(run[name] for run in runs[arm]) for name in runs[arm][0]}
        for arm in ARMS
    }
    whole, chunked = medians["whole"], medians["chunked"]
    report = {
        "what": "bench_logprobs",
        "environment": environment_report(),
        "threads": options.threads or torch.get_num_threads(),
        "options": {k: v for k, v in vars(options).items() if k not in ("arm", "output")},
        "runs": runs,
        "medians": medians,
        "memory_ratio": whole["extra_mib"] / chunked["extra_mib"],
        "time_ratio": chunked["seconds"] / whole["seconds"],
        # Less hurt by what else runs on the machine.
        "cpu_time_ratio": chunked["cpu_seconds"] / whole["cpu_seconds"],
        "wanted": {"memory_ratio": "at least 8", "time_ratio": "at most 1.5"},
        "difference": {n: abs(whole[n] - chunked[n]) / abs(whole[n]) for n in NORMS},
    }
    show(report)
    options.output.write_text(json.dumps(report, indent=2, default=str) + "\n")
    print(f"{options.output}: written")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--loss", choices=("logprob", "entropy"), default="logprob")
    parser.add_argument("--chunk-tokens", type=int, help="default: what training takes")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, help="of the CPU; default: torch's")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("bench_logprobs.json"))
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    return parser.parse_args()


def in_a_process(arm: str) -> dict[str, float]:
    """One run in a process that has done nothing else."""
    command = [sys.executable, __file__, *sys.argv[1:], "--arm", arm]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{arm}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Seconds and MiB of one pass, and norms of what it gave."""
    if options.threads:
        torch.set_num_threads(options.threads)
    arm = arms(options)[options.arm]
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(options.tokens, options.hidden, generator=generator)
    weight = torch.randn(options.vocab, options.hidden, generator=generator)
    weight *= 3 / options.hidden**0.5
    labels = torch.randint(0, options.vocab, (options.tokens,), generator=generator).to(device)
    hidden, weight = (part.to(device, dtype).requires_grad_() for part in (hidden, weight))
    # Libraries start their threads and allocate their workspaces.
    run(
        arm,
        hidden[:16].detach().requires_grad_(),
        weight[:512].detach().requires_grad_(),
        labels[:16] % 512,
        options,
    )
    memory = Memory(device)
    started, worked = time.perf_counter(), time.process_time()
    scores = run(arm, hidden, weight, labels, options)
    memory.synchronize()
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - worked
    extra = memory.extra_bytes() / MIB
    assert hidden.grad is not None
    assert weight.grad is not None
    tensors = (*scores, hidden.grad, weight.grad)
    norms = {name: float(t.double().norm()) for name, t in zip(NORMS, tensors, strict=True)}
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "extra_mib": extra, **norms}


Arm = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def run(
    arm: Arm, hidden: Tensor, weight: Tensor, labels: Tensor, options: argparse.Namespace
) -> tuple[Tensor, Tensor]:
    logprobs, entropies = arm(hidden, weight, labels)
    loss = logprobs.sum()
    if options.loss == "entropy":
        loss = loss + entropies.sum()
    loss.backward()
    return logprobs.detach(), entropies.detach()


def arms(options: argparse.Namespace) -> dict[str, Arm]:
    from nested_reft_mcore.launch.context import ParallelDimension
    from nested_reft_mcore.mcore.logprobs import token_logprobs

    alone = ParallelDimension(0, 1, (0,))

    def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        rows = (hidden @ weight.t()).float().log_softmax(-1)
        logprobs = rows.gather(-1, labels[:, None])[:, 0]
        with torch.set_grad_enabled(options.loss == "entropy"):
            return logprobs, -(rows.exp() * rows).sum(-1)

    def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logprobs, entropies = token_logprobs(
            hidden[:, None],
            weight,
            labels[None],
            temperature=1.0,
            vocab_size=weight.shape[0],
            tensor=alone,
            chunk_tokens=options.chunk_tokens,
        )
        return logprobs[0], entropies[0]

    return {"whole": whole, "chunked": chunked}


class Memory:
    """The peak from now on, above what is in use now."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            self.synchronize()
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)
        else:
            # Linux: the highest resident size starts anew from the present one.
            Path("/proc/self/clear_refs").write_text("5")
            self.before = resident("VmRSS")

    def extra_bytes(self) -> int:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self.before
        return resident("VmHWM") - self.before

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def resident(name: str) -> int:
    """Bytes of a line of /proc/self/status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {name}")


def show(report: dict[str, Any]) -> None:
    options = report["options"]
    print(
        f"{options['tokens']} tokens, vocabulary {options['vocab']}, hidden {options['hidden']}, "
        f"{options['dtype']}, loss {options['loss']}, {options['device']}, "
        f"{report['threads']} threads, {options['rounds']} rounds"
    )
    print(f"{'':<8} {'extra MiB':>10} {'seconds':>8}  {'spread':<16} CPU seconds")
    for arm, found in report["medians"].items():
        seconds = [run["seconds"] for run in report["runs"][arm]]
        print(
            f"{arm:<8} {found['extra_mib']:>10,.0f} {found['seconds']:>8.2f}  "
            f"{f'{min(seconds):.2f} to {max(seconds):.2f}':<16} {found['cpu_seconds']:.2f}"
        )
    print(
        f"memory: {report['memory_ratio']:.1f}x less (wanted: {report['wanted']['memory_ratio']})"
    )
    print(f"time:   {report['time_ratio']:.2f}x (wanted: {report['wanted']['time_ratio']})")
    print(f"processor time: {report['cpu_time_ratio']:.2f}x")
    print("norms differ by", {k: f"{v:.0e}" for k, v in report["difference"].items()})


if __name__ == "__main__":
    main()
