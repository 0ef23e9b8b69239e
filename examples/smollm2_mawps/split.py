"""Split a MAWPS file into prompts to train on and prompts held out, no question in both."""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

NUM_EVAL = 16


def split(lines: list[str], num_eval: int, seed: int) -> tuple[list[str], list[str]]:
    """Shuffle the lines that differ in more than case and spaces; (train, eval).

    MAWPS repeats questions word by word. Equal stories with other numbers stay apart: they are
    other questions. KeyError for a line without `input`, ValueError for one that is not JSON.
    """
    distinct = {
        " ".join(str(json.loads(line)["input"]).lower().split()): line.strip() + "\n"
        for line in lines
        if line.strip()
    }
    shuffled = list(distinct.values())
    random.Random(seed).shuffle(shuffled)
    return shuffled[num_eval:], shuffled[:num_eval]


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
    except (KeyError, TypeError, ValueError) as error:
        print(f"{arguments.data}: expected JSON lines with `input`: {error!r}", file=sys.stderr)
        sys.exit(2)
    if not train:
        print(f"{arguments.data}: expected more than {arguments.num_eval} lines", file=sys.stderr)
        sys.exit(2)
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", train), ("eval", held_out)):
        (arguments.output / f"{name}.jsonl").write_text("".join(part), encoding="utf-8")
    print(f"{arguments.data}: {len(train)} prompts to train on, {len(held_out)} held out")


if __name__ == "__main__":
    main()
