"""vLLM in an interpreter of its own: it generates when asked, and sleeps in between.

Run as `PYTHON vllm_worker.py JSON` by an environment that has vLLM but not this package, so it
imports nothing of ours. A line in is a request, a line out the answer, both JSON; what vLLM itself
prints to stdout goes to stderr. It leaves when its input ends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any


def main() -> None:
    """Load the model that the only argument describes, then answer requests."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    os.dup2(2, 1)
    settings = json.loads(sys.argv[1])
    # One process, which waits for its input: the engine's own process would spin in between.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    # "nobind" leaves the number of threads to OMP_NUM_THREADS.
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["VLLM_CPU_KVCACHE_SPACE"] = str(settings["kv_gigabytes"])
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    import vllm

    model = vllm.LLM(
        model=settings["model"],
        dtype=settings["dtype"],
        enforce_eager=True,
        max_model_len=settings["max_length"],
        max_num_seqs=settings["max_sequences"],
        seed=0,
        skip_tokenizer_init=True,
        # Every run would find the prompts of the one before.
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    print(json.dumps({"version": vllm.__version__}), file=answers)
    for line in sys.stdin:
        print(json.dumps(_generate(vllm, model, json.loads(line))), file=answers)


def _generate(vllm: Any, model: Any, request: dict[str, Any]) -> dict[str, Any]:
    """Complete `prompts` (token ids) by `new_tokens` each; seconds, and tokens of all."""
    sampling = vllm.SamplingParams(
        max_tokens=request["new_tokens"], ignore_eos=True, temperature=1.0, detokenize=False
    )
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    started = time.perf_counter()
    outputs = model.generate(prompts, sampling, use_tqdm=False)
    seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "tokens": sum(len(output.outputs[0].token_ids) for output in outputs),
    }


if __name__ == "__main__":
    main()
