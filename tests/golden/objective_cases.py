"""The settings and inputs of the golden values: plain Python, without our code."""

import itertools
import math
import random

DEFAULTS = {
    "objective": "reinforce",
    "correction": "practical",
    "correction_settings": {},
    "rejections": [],
    "log_ratio_clamp": 20.0,
    "clip_ratio_low": 0.2,
    "clip_ratio_high": 0.2,
    "clip_ratio_c": None,
    "bypass_mode": False,
    "loss_agg_mode": "token-mean",
    "max_response_length": 1,
    "entropy_coeff": 0.0,
    "kl_loss_coef": 0.0,
    "kl_loss_type": "k3",
    "kl_corrected": False,
}
BOUNDS = {"retrace_lambda": 1.0, "lower": 0.0, "upper": math.inf, "log_clamp": 20.0}

CORRECTIONS = {
    "practical": {},
    "base": {},
    "retrace": {"retrace_lambda": 0.9},
    "retrace_cumulative": {"retrace_lambda": 0.95},
    "trajectory": {},
    "trajectory_truncated": {"upper": 1.05},
    "trajectory_clamped": {"log_clamp": 0.2},
    "prefix": {},
    "prefix_truncated": {"upper": 1.08},
    "tis": {"upper": 1.25},
    "icepop": {"lower": 0.75, "upper": 1.4},
    "geometric": {},
    "geometric_truncated": {"upper": 1.02},
}
REJECTIONS = [
    ("token_k1", 1.4, None),
    ("token_k1", 1.6, 0.9),
    ("token_k2", 0.08, None),
    ("token_k3", 0.05, None),
    ("seq_sum_k1", 1.3, None),
    ("seq_sum_k2", 0.2, None),
    ("seq_sum_k3", 0.3, None),
    ("seq_mean_k1", 1.04, None),
    ("seq_mean_k2", 0.05, None),
    ("seq_mean_k3", 0.05, None),
    ("seq_max_k2", 0.2, None),
    ("seq_max_k3", 0.15, None),
]
MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
WIDE = {"clip_ratio_low": 0.1, "clip_ratio_high": 0.28}


def make_cases() -> dict:
    """Settings by name; what is left out has its default."""
    cases = {}
    for name, bounds in CORRECTIONS.items():
        correction = name.removesuffix("_truncated").removesuffix("_clamped")
        settings = {"correction": correction, "correction_settings": bounds}
        cases[f"reinforce_{name}"] = settings
        for objective in ("ppo_clip", "cispo", "gspo"):
            cases[f"{objective}_{name}"] = {**settings, **WIDE, "objective": objective}
    for (rule, upper, lower), mode in itertools.product(REJECTIONS, MODES):
        name = f"reject_{rule}_{upper}_{lower}_{mode}"
        cases[name] = {
            "correction": "tis",
            "correction_settings": {"upper": 1.25},
            "rejections": [{"name": rule, "upper": upper, "lower": lower}],
            "loss_agg_mode": mode,
            "max_response_length": 7,
        }
    cases["reject_everything"] = {
        "rejections": [{"name": "token_k2", "upper": 1e-12, "lower": None}],
    }
    cases["reject_twice"] = {
        "objective": "gspo",
        "correction": "base",
        "rejections": [
            {"name": "token_k1", "upper": 1.6, "lower": 0.7},
            {"name": "seq_max_k3", "upper": 0.2, "lower": None},
        ],
    }
    return cases | variants()


def variants() -> dict:
    """Bypass, dual clip, regularizers and clamps, one at a time."""
    cases = {}
    for objective, mode in itertools.product(("ppo_clip", "cispo", "gspo"), MODES):
        cases[f"{objective}_bypass_{mode}"] = {
            **WIDE,
            "objective": objective,
            "bypass_mode": True,
            "loss_agg_mode": mode,
            "max_response_length": 9,
        }
    for objective in ("ppo_clip", "gspo"):
        cases[f"{objective}_dual_clip"] = {
            "objective": objective,
            "bypass_mode": True,
            "clip_ratio_low": 0.5,
            "clip_ratio_high": 0.5,
            "clip_ratio_c": 1.02,
        }
    for kind, corrected in itertools.product(("k1", "k2", "k3"), (False, True)):
        cases[f"kl_{kind}_{'corrected' if corrected else 'plain'}"] = {
            "objective": "ppo_clip",
            "correction": "tis",
            "kl_loss_coef": 0.3,
            "kl_loss_type": kind,
            "kl_corrected": corrected,
            "entropy_coeff": 0.05,
            "loss_agg_mode": "seq-mean-token-mean",
        }
    cases["clamped"] = {
        "objective": "ppo_clip",
        "correction": "base",
        "log_ratio_clamp": 0.25,
        "clip_ratio_low": 0.5,
        "clip_ratio_high": 0.5,
        "kl_loss_coef": 0.1,
        "kl_corrected": True,
    }
    return cases


def make_inputs(seed: int, batch: int = 5, seq: int = 7) -> dict:
    """Random log-probs, the others near the target; a row of one token and one of none."""
    generator = random.Random(seed)

    def table(draw):
        return [[draw() for _ in range(seq)] for _ in range(batch)]

    def near(centre, spread):
        return [[min(-1e-3, x + generator.gauss(0, spread)) for x in row] for row in centre]

    target = table(lambda: -generator.expovariate(0.8) - 1e-3)
    old = near(target, 0.25)
    mask = table(lambda: generator.random() < 0.7)
    mask[-2] = [t == 2 for t in range(seq)]
    mask[-1] = [False] * seq
    return {
        "target_logprobs": target,
        "old_logprobs": old,
        "behavior_logprobs": near(old, 0.4),
        "ref_logprobs": near(target, 0.5),
        "entropy": table(lambda: generator.uniform(0, 3)),
        "advantages": [generator.gauss(0, 1) for _ in range(batch)],
        "response_mask": mask,
    }


def with_faults(inputs: dict) -> dict:
    """The same with NaN at every masked position, and with a log-prob that is not finite at one
    response token each of behavior, old and reference."""
    mask = inputs["response_mask"]
    dirty = {}
    for name, rows in inputs.items():
        if name in ("advantages", "response_mask"):
            dirty[name] = rows
            continue
        dirty[name] = [
            [x if kept else math.nan for x, kept in zip(row, is_response, strict=True)]
            for row, is_response in zip(rows, mask, strict=True)
        ]
    responses = [(b, t) for b, row in enumerate(mask) for t, kept in enumerate(row) if kept]
    faults = {
        "behavior_logprobs": (responses[3], -math.inf),
        "old_logprobs": (responses[8], math.nan),
        "ref_logprobs": (responses[11], math.inf),
    }
    for name, ((b, t), value) in faults.items():
        dirty[name][b][t] = value
    return dirty
