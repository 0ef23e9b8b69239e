"""Write objective_goldens.json: losses, gradients and metrics by plain Python, without our code.

Every formula is spelled out again here, for one token or sequence at a time and with the gradient
derived by hand, so that the package and this script only agree if both are right. Run it from
anywhere:

    python tests/golden/make_objective_goldens.py
"""

import json
import math
import platform
from importlib.metadata import version
from pathlib import Path

from objective_cases import BOUNDS, DEFAULTS, MODES, make_cases, make_inputs, with_faults

OUTPUT = Path(__file__).with_name("objective_goldens.json")


def clip(value: float, low: float, high: float) -> float:
    """Value cut to [low, high]."""
    return max(low, min(high, value))


def log_ratio(numerator: float, denominator: float, clamp: float) -> float | None:
    """Clamped difference, None where it is not finite."""
    difference = numerator - denominator
    return clip(difference, -clamp, clamp) if math.isfinite(difference) else None


def correct(name: str, logs: list, bounds: dict) -> list:
    """Weight of each token of a sequence, None for tokens that it rejects; `logs` has None for
    tokens whose ratio is not finite."""
    upper, lam = bounds["upper"], bounds["retrace_lambda"]
    finite = [x for x in logs if x is not None]
    whole = len(finite) == len(logs)

    def from_sum(total: float) -> float:
        return min(upper, math.exp(clip(total, -bounds["log_clamp"], bounds["log_clamp"])))

    weights, so_far, trace = [], 0.0, 1.0
    for x in logs:
        if x is None:
            # What is behind it has no product up to itself.
            so_far = trace = None
        elif so_far is not None:
            so_far, trace = so_far + x, trace * lam * min(1.0, math.exp(x))
        token = None if x is None else math.exp(x)
        if name in ("trajectory", "geometric"):
            if not whole:
                weights.append(None)
            elif name == "trajectory":
                weights.append(from_sum(math.fsum(finite)))
            else:
                weights.append(min(upper, math.exp(math.fsum(finite) / len(finite))))
        elif name in ("prefix", "retrace_cumulative"):
            unknown = so_far is None
            weights.append(None if unknown else from_sum(so_far) if name == "prefix" else trace)
        elif token is None:
            weights.append(None)
        elif name == "icepop":
            weights.append(token if bounds["lower"] <= token <= upper else None)
        else:
            value = {"practical": 1.0, "base": token, "tis": min(token, upper)}
            weights.append(lam * min(1.0, token) if name == "retrace" else value[name])
    return weights


def k_estimate(kind: str, log_r: float) -> float:
    """Schulman's estimators of KL(behavior || target) from r = target / behavior."""
    r = math.exp(log_r)
    return {"k1": -log_r, "k2": log_r**2 / 2, "k3": r - 1 - log_r}[kind]


def passes(rule: dict, logs: list) -> list:
    """Which tokens of a sequence a rejection rule accepts; not finite ones are left to others."""
    level, kind = rule["name"].rsplit("_", 1)
    values = [k_estimate(kind, x) for x in logs if x is not None]
    high, low = rule["upper"], -math.inf
    if kind == "k1":
        # The bounds of k1 = -log r are ratios: those of behavior / target.
        lower = 1 / rule["upper"] if rule["lower"] is None else rule["lower"]
        high, low = math.log(rule["upper"]), math.log(lower)
    if level == "token":
        return [x is not None and low <= k_estimate(kind, x) <= high for x in logs]
    total = {
        "seq_sum": math.fsum(values),
        "seq_mean": math.fsum(values) / max(1, len(values)),
        "seq_max": max(values, default=0.0),
    }[level]
    return [low <= total <= high] * len(logs)


def sequence_terms(tokens: list, case: dict) -> list:
    """Everything about each response token of a sequence, as dictionaries."""
    clamp, bypass = case["log_ratio_clamp"], case["bypass_mode"]
    has_ratio = case["objective"] != "reinforce"
    decoupled = has_ratio and not bypass
    numerator = "old" if decoupled else "target"
    logs = [log_ratio(token[numerator], token["behavior"], clamp) for token in tokens]
    weights = correct(case["correction"], logs, BOUNDS | case["correction_settings"])
    kept = [weight is not None for weight in weights]
    for rule in case["rejections"]:
        kept = [a and b for a, b in zip(kept, passes(rule, logs), strict=True)]
    lost = sum(x is None for x in logs)
    objective_logs = [None] * len(tokens)
    if has_ratio:
        anchor = "old" if decoupled else "behavior"
        objective_logs = [log_ratio(t["target"], t[anchor], clamp) for t in tokens]
        lost += sum(k and x is None for k, x in zip(kept, objective_logs, strict=True))
        kept = [k and x is not None for k, x in zip(kept, objective_logs, strict=True)]
    used = [x for x, k in zip(objective_logs, kept, strict=True) if k and has_ratio]
    sequence_log = math.fsum(used) / max(1, len(used))
    terms = []
    for token, x, weight, is_kept, y in zip(
        tokens, logs, weights, kept, objective_logs, strict=True
    ):
        term = {"kept": is_kept, "log": x, "kl": token["behavior"] - token[numerator]}
        if is_kept:
            term |= token_terms(token, weight, y, sequence_log, case)
            if case["kl_loss_coef"] and term["kl_term"] is None:
                lost, term["kept"] = lost + 1, False
        terms.append(term)
    if terms:
        terms[0]["lost"] = lost
    return terms


def token_terms(token: dict, weight: float, y, sequence_log: float, case: dict) -> dict:
    """Loss and gradient of a kept token, before aggregation. y: log-ratio of the objective."""
    clamp, advantage = case["log_ratio_clamp"], token["advantage"]
    terms = {"weight": weight, "actor/entropy": token["entropy"]}
    if case["objective"] == "reinforce":
        loss, gradient = -advantage * token["target"], -advantage
    else:
        log_r = sequence_log if case["objective"] == "gspo" else y
        r = math.exp(log_r)
        clipped = clip(r, 1 - case["clip_ratio_low"], 1 + case["clip_ratio_high"])
        terms["actor/ppo_kl"] = -y
        if case["objective"] == "cispo":
            loss, gradient = -clipped * advantage * token["target"], -clipped * advantage
            terms["actor/pg_clipfrac"] = float(clipped != r)
        else:
            loss = -min(r * advantage, clipped * advantage)
            held = clipped * advantage < r * advantage
            terms["actor/pg_clipfrac"] = float(held)
            anchor = token["behavior"] if case["bypass_mode"] else token["old"]
            # A log-ratio that the clamp holds does not move with the target.
            moves = abs(token["target"] - anchor) <= clamp
            gradient = -advantage * r if moves and not held else 0.0
            if case["clip_ratio_c"] is not None:
                ceiling = -advantage * case["clip_ratio_c"]
                bounded = advantage < 0 and loss > ceiling
                terms["actor/pg_clipfrac_lower"] = float(bounded)
                if bounded:
                    loss, gradient = ceiling, 0.0
    loss, gradient = weight * loss, weight * gradient
    terms["actor/pg_loss"] = loss
    if case["kl_loss_coef"]:
        terms["kl_term"] = kl_terms(token, case)
        if terms["kl_term"] is not None:
            value, slope = terms["kl_term"]
            terms["actor/kl_loss"] = value
            loss += case["kl_loss_coef"] * value
            gradient += case["kl_loss_coef"] * slope
    loss -= case["entropy_coeff"] * token["entropy"]
    return terms | {"loss": loss, "gradient": gradient}


def kl_terms(token: dict, case: dict):
    """Value of the KL estimate and its derivative by the target log-prob, None if not finite."""
    clamp = case["log_ratio_clamp"]
    d = log_ratio(token["ref"], token["target"], clamp)
    if d is None:
        return None
    slope_of_d = -1.0 if abs(token["ref"] - token["target"]) <= clamp else 0.0
    value = {"k1": -d, "k2": d**2 / 2, "k3": math.exp(d) - 1 - d}[case["kl_loss_type"]]
    slope = {"k1": -1.0, "k2": d, "k3": math.exp(d) - 1}[case["kl_loss_type"]] * slope_of_d
    if case["kl_corrected"]:
        log_u = log_ratio(token["target"], token["behavior"], clamp)
        u = math.exp(log_u)
        slope_of_u = u if abs(token["target"] - token["behavior"]) <= clamp else 0.0
        value, slope = u * value, u * slope + slope_of_u * value
    return value, slope


def solve(inputs: dict, case: dict) -> dict:
    """What `policy_loss` and `finalize_metrics` should give."""
    case = DEFAULTS | case
    seq = len(inputs["response_mask"][0])
    gradient, entropy_gradient, rows = [], [], []
    loss_sum = 0.0
    for b, mask in enumerate(inputs["response_mask"]):
        places = [t for t in range(seq) if mask[t]]
        names = ("target", "old", "behavior", "ref")
        tokens = [
            {name: inputs[f"{name}_logprobs"][b][t] for name in names}
            | {"entropy": inputs["entropy"][b][t], "advantage": inputs["advantages"][b]}
            for t in places
        ]
        terms = sequence_terms(tokens, case)
        rows.append(terms)
        num_kept = sum(term["kept"] for term in terms)
        share = {
            "token-mean": 1.0,
            "seq-mean-token-mean": 1.0 / max(1, num_kept),
            "seq-mean-token-sum-norm": 1.0 / case["max_response_length"],
        }[case["loss_agg_mode"]]
        gradient.append([0.0] * seq)
        entropy_gradient.append([0.0] * seq)
        for t, term in zip(places, terms, strict=True):
            if term["kept"]:
                loss_sum += share * term["loss"]
                gradient[b][t] = share * term["gradient"]
                entropy_gradient[b][t] = -share * case["entropy_coeff"]
    denominator = {
        "token-mean": sum(term["kept"] for terms in rows for term in terms),
        "seq-mean-token-mean": sum(any(term["kept"] for term in terms) for terms in rows),
        "seq-mean-token-sum-norm": sum(bool(terms) for terms in rows),
    }[case["loss_agg_mode"]]
    logs = [term["log"] for terms in rows for term in terms if term["log"] is not None]
    closeness = sorted(math.exp(-abs(x)) for x in logs)
    return {
        "loss_sum": loss_sum,
        "denominator": denominator,
        "gradient": gradient,
        "entropy_gradient": entropy_gradient,
        "metrics": metrics_of(rows, BOUNDS | case["correction_settings"]),
        "ratio_p05": closeness[-(-len(logs) // 20) - 1],
    }


def metrics_of(rows: list, bounds: dict) -> dict:
    """Off-policy statistics over all finite ratios, the objective's over kept tokens."""
    finite = [term for terms in rows for term in terms if term["log"] is not None]
    kept = [term for terms in rows for term in terms if term["kept"]]
    ratios = [math.exp(term["log"]) for term in finite]
    sequences = [[term for term in terms if term["log"] is not None] for terms in rows]
    sequences = [terms for terms in sequences if terms]
    products = [math.exp(math.fsum(t["log"] for t in terms)) for terms in sequences]

    def mean(values) -> float:
        found = list(values)
        return math.fsum(found) / len(found)

    def ess(values) -> float:
        return math.fsum(values) ** 2 / (len(values) * math.fsum(v * v for v in values))

    metrics = {
        "rollout_corr/kl": mean(term["kl"] for term in finite),
        "rollout_corr/k3_kl": mean(k_estimate("k3", term["log"]) for term in finite),
        "rollout_corr/chi2_token": mean(r * r - 1 for r in ratios),
        "rollout_corr/rollout_is_mean": mean(ratios),
        "rollout_corr/rollout_is_max": max(ratios),
        "rollout_corr/rollout_is_eff_sample_size": ess(ratios),
        "nested/ess": ess(ratios),
        "rollout_corr/chi2_seq": mean(r * r - 1 for r in products),
        "rollout_corr/seq_ratio_mean": mean(products),
        "nested/ess_seq": ess(products),
        "rollout_corr/rollout_is_ratio_fraction_high": mean(r > bounds["upper"] for r in ratios),
        "rollout_corr/rollout_is_ratio_fraction_low": mean(r < bounds["lower"] for r in ratios),
        "rollout_corr/rollout_rs_masked_fraction": mean(not term["kept"] for term in finite),
        "rollout_corr/rollout_rs_seq_masked_fraction": mean(
            any(not term["kept"] for term in terms) for terms in sequences
        ),
        "nested/num_non_finite_ratios": float(sum(t[0].get("lost", 0) for t in rows if t)),
    }
    if kept:
        names = sorted({key for term in kept for key in term if key.startswith("actor/")})
        metrics |= {name: mean(term[name] for term in kept) for name in names}
        metrics["rollout_corr/weight_mean"] = mean(term["weight"] for term in kept)
    return metrics


def main() -> None:
    """Write the file next to this script."""
    clean = make_inputs(seed=2508)
    inputs = {"clean": clean, "faulty": with_faults(clean)}
    cases = make_cases()
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
            {"name": name, "inputs": kind, "settings": case, "expected": solve(inputs[kind], case)}
            for name, case in cases.items()
            for kind in inputs
            # The other denominators take nothing else from a token that has no ratio.
            if kind == "clean" or not name.endswith(tuple(MODES[1:]))
        ],
    }
    OUTPUT.write_text(json.dumps(document) + "\n")


if __name__ == "__main__":
    main()
