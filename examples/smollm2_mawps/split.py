"""Split a MAWPS file into prompts to train on and prompts held out, no question in both.

Each gets a `demonstration`, from which the warm-up learns: the calculation with two numbers of the
question that gives the answer, or the answer alone where there is none.
"""

from __future__ import annotations

import argparse
import json
import operator
import random
import re
import sys
from collections.abc import Callable
from itertools import permutations, product
from pathlib import Path
from typing import NoReturn

NUM_EVAL = 16
NUMBER = re.compile(r"\d[\d,]*\.?\d+|\d")
ROUNDING = 1e-5
"""MAWPS writes 3.33333 for 10 / 3."""
OPERATIONS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}


def split(lines: list[str], num_eval: int, seed: int) -> tuple[list[str], list[str]]:
    """Shuffle the questions that differ in more than case and spaces; (train, eval).

    MAWPS repeats questions word by word. Equal stories with other numbers stay apart: they are
    other questions. ValueError or KeyError for a line that is not JSON with `input` and `target`.
    """
    records = [json.loads(line) for line in lines if line.strip()]
    distinct = {" ".join(record["input"].lower().split()): record for record in records}
    shuffled = [
        json.dumps(record | {"demonstration": demonstration(record["input"], record["target"])})
        + "\n"
        for record in distinct.values()
    ]
    random.Random(seed).shuffle(shuffled)
    return shuffled[num_eval:], shuffled[:num_eval]


def demonstration(question: str, target: float) -> str:
    """A calculation such as `7 + 7 = 14`, or `14` if no two numbers of the question give it."""
    numbers = [float(text.replace(",", "")) for text in NUMBER.findall(question)]
    for (sign, operate), (left, right) in product(OPERATIONS.items(), permutations(numbers, 2)):
        is_possible = sign != "/" or right != 0
        if is_possible and abs(operate(left, right) - target) < ROUNDING:
            return f"{left:.10g} {sign} {right:.10g} = {target:.10g}"
    return f"{target:.10g}"


def refuse(reason: str) -> NoReturn:
    """Leave with the exit code of a user's mistake."""
    print(reason, file=sys.stderr)
    sys.exit(2)


def main() -> None:
    """Parse the command line and write `train.jsonl` and `eval.jsonl`."""
    parser = argparse.ArgumentParser(description="Split a MAWPS file for training and evaluation.")
    parser.add_argument("data", type=Path, help="JSON lines with `input` and `target`")
    parser.add_argument("--output", type=Path, required=True, help="directory to write into")
    parser.add_argument("--num-eval", type=int, default=NUM_EVAL, help="prompts held out")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same split")
    arguments = parser.parse_args()
    lines = arguments.data.read_text(encoding="utf-8").splitlines()
    try:
        train, held_out = split(lines, arguments.num_eval, arguments.seed)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        refuse(f"{arguments.data}: expected JSON lines with `input` and `target`: {error!r}")
    if not train:
        refuse(f"{arguments.data}: expected more than {arguments.num_eval} questions")
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("eval", held_out)):
        (arguments.output / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    print(f"{arguments.data}: {len(train)} prompts to train on, {len(held_out)} held out")


if __name__ == "__main__":
    main()
