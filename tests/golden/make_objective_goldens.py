"""Write objective_goldens.json: losses, gradients and metrics by plain Python, without our code.

Every formula is spelled out again here, for one token at a time and with the gradient derived by
hand, so that the package and this script only agree if both are right. Run it from anywhere:

    python tests/golden/make_objective_goldens.py
"""

import json
import math
import platform
import random
from importlib.metadata import version
from pathlib import Path

OUTPUT = Path(__file__).with_name("objective_goldens.json")

CASES = {
    "reinforce_practical": {"objective": "reinforce", "correction": "practical"},
    "reinforce_base": {"objective": "reinforce", "correction": "base"},
    "reinforce_base_clamped": {
        "objective": "reinforce",
        "correction": "base",
        "log_ratio_clamp": 0.3,
    },
    "reinforce_retrace": {
        "objective": "reinforce",
        "correction": "retrace",
        "retrace_lambda": 0.9,
    },
    "ppo_decoupled_practical": {"objective": "ppo_clip", "correction": "practical"},
    "ppo_decoupled_base": {
        "objective": "ppo_clip",
        "correction": "base",
        "clip_ratio_low": 0.1,
        "clip_ratio_high": 0.28,
    },
    "ppo_decoupled_retrace": {
        "objective": "ppo_clip",
        "correction": "retrace",
        "retrace_lambda": 0.7,
        "clip_ratio_low": 0.3,
        "clip_ratio_high": 0.05,
    },
    "ppo_decoupled_clamped": {
        "objective": "ppo_clip",
        "correction": "base",
        "log_ratio_clamp": 0.25,
        "clip_ratio_low": 0.5,
        "clip_ratio_high": 0.5,
    },
    "ppo_bypass": {"objective": "ppo_clip", "correction": "practical", "bypass_mode": True},
}
DEFAULTS = {
    "retrace_lambda": 1.0,
    "log_ratio_clamp": 20.0,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "bypass_mode": False,
}


def make_inputs(seed: int, batch: int = 4, seq: int = 7) -> dict:
    """Random log-probs with behavior and old near target; the last row is wholly masked."""
    generator = random.Random(seed)

    def table(draw):
        return [[draw() for _ in range(seq)] for _ in range(batch)]

    def near(centre, spread):
        return [[min(-1e-3, x + generator.gauss(0, spread)) for x in row] for row in centre]

    target = table(lambda: -generator.expovariate(0.8) - 1e-3)
    old = near(target, 0.25)
    mask = table(lambda: generator.random() < 0.7)
    mask[-1] = [False] * seq
    return {
        "target_logprobs": target,
        "old_logprobs": old,
        "behavior_logprobs": near(old, 0.4),
        "entropy": table(lambda: generator.uniform(0, 3)),
        "advantages": [generator.gauss(0, 1) for _ in range(batch)],
        "response_mask": mask,
    }


def clip(value: float, low: float, high: float) -> float:
    """Value cut to [low, high]."""
    return max(low, min(high, value))


def correction(name: str, ratio: float, retrace_lambda: float) -> float:
    """Weight of a token whose importance ratio is `ratio`."""
    if name == "practical":
        return 1.0
    return ratio if name == "base" else retrace_lambda * min(1.0, ratio)


def token_terms(token: dict, case: dict) -> dict:
    """Loss, gradient by the target log-prob, and metrics of one token."""
    clamp = case["log_ratio_clamp"]
    target, old, behavior = token["target"], token["old"], token["behavior"]
    decoupled = case["objective"] == "ppo_clip" and not case["bypass_mode"]
    numerator = old if decoupled else target
    log_w = clip(numerator - behavior, -clamp, clamp)
    weight = correction(case["correction"], math.exp(log_w), case["retrace_lambda"])
    advantage = token["advantage"]
    terms = {
        "rollout_corr/kl": behavior - numerator,
        "rollout_corr/k3_kl": math.exp(log_w) - 1 - log_w,
        "rollout_corr/chi2_token": math.exp(log_w) ** 2 - 1,
        "rollout_corr/rollout_is_mean": math.exp(log_w),
        "actor/entropy": token["entropy"],
        "ratio": math.exp(log_w),
    }
    if case["objective"] == "reinforce":
        loss, gradient = -weight * advantage * target, -weight * advantage
    else:
        difference = target - (old if decoupled else behavior)
        ratio = math.exp(clip(difference, -clamp, clamp))
        clipped = clip(ratio, 1 - case["clip_ratio_low"], 1 + case["clip_ratio_high"])
        is_clipped = clipped * advantage < ratio * advantage
        loss = -weight * min(ratio * advantage, clipped * advantage)
        # d ratio / d target = ratio, but for a log-ratio that the clamp holds.
        moves = abs(difference) <= clamp and not is_clipped
        gradient = -weight * advantage * ratio if moves else 0.0
        terms["actor/pg_clipfrac"] = float(is_clipped)
        terms["actor/ppo_kl"] = -clip(difference, -clamp, clamp)
    return terms | {"loss": loss, "gradient": gradient, "actor/pg_loss": loss}


def solve(inputs: dict, case: dict) -> dict:
    """What `policy_loss` and `finalize_metrics` should give."""
    case = DEFAULTS | case
    gradient = [[0.0] * len(row) for row in inputs["target_logprobs"]]
    terms = []
    for b, row in enumerate(inputs["response_mask"]):
        for t, is_response in enumerate(row):
            if not is_response:
                continue
            token = {
                "target": inputs["target_logprobs"][b][t],
                "old": inputs["old_logprobs"][b][t],
                "behavior": inputs["behavior_logprobs"][b][t],
                "entropy": inputs["entropy"][b][t],
                "advantage": inputs["advantages"][b],
            }
            terms.append(token_terms(token, case))
            gradient[b][t] = terms[-1]["gradient"]
    n = len(terms)
    names = [k for k in terms[0] if "/" in k]
    metrics = {name: math.fsum(term[name] for term in terms) / n for name in names}
    ratios = [term["ratio"] for term in terms]
    ess = math.fsum(ratios) ** 2 / (n * math.fsum(r * r for r in ratios))
    metrics["rollout_corr/rollout_is_eff_sample_size"] = metrics["nested/ess"] = ess
    metrics["rollout_corr/rollout_is_max"] = max(ratios)
    metrics["nested/num_non_finite_ratios"] = 0.0
    closeness = sorted(min(r, 1 / r) for r in ratios)
    return {
        "loss_sum": math.fsum(term["loss"] for term in terms),
        "num_tokens": n,
        "gradient": gradient,
        "metrics": metrics,
        "ratio_p05": closeness[-(-n // 20) - 1],
    }


def main() -> None:
    """Write the file next to this script."""
    inputs = make_inputs(seed=2508)
    document = {
        "provenance": {
            "script": "tests/golden/make_objective_goldens.py",
            "method": "plain Python, float64, gradients derived by hand",
            "dtype": "float64",
            "python": platform.python_version(),
            "torch": version("torch"),
            "torch_role": "not used to make the values; installed when they were first checked",
        },
        "inputs": inputs,
        "cases": [
            {"name": name, "settings": case, "expected": solve(inputs, case)}
            for name, case in CASES.items()
        ],
    }
    OUTPUT.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
