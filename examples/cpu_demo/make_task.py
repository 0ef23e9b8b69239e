"""Write the arithmetic-story task: prompts, demonstrations and a tokenizer whose words are tokens.

A story begins with a value and changes it four times, `tom 5 gets 3 loses 2 finds 1 eats 4 ?`;
the answer is what is left. Values stay within 0..9. Demonstrations answer in one of two styles:
directly, `# 3 ,`, or with the running values, `> 8 , 6 , 7 , 3`. Longer stories and answers, for
examples/correction_study: `--num-operations`, and `--copy`, which has every change stand before its
value, `> gets 3 8 , loses 2 6 , finds 1 7 , eats 4 3`.
"""

from __future__ import annotations

import argparse
import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

NAMES = ("ann", "ben", "cleo", "dan", "eva", "finn", "gus", "tom")
GAINS = ("finds", "gets")
LOSSES = ("eats", "loses")
SIGNS = ("#", ",", ">", "?")
SPECIAL_TOKENS = 3
"""Padding, unknown, end of sequence: ids 0, 1, 2."""

MAX_VALUE = 9
MAX_OPERAND = 5
NUM_OPERATIONS = 4
DIRECT_SHARE = 0.55
"""Share of the demonstrations that answer directly."""


@dataclass(frozen=True)
class Story:
    """A question and the values that its answer runs through."""

    prompt: str
    running_values: tuple[int, ...]
    """After each operation; the last one is the answer."""
    changes: tuple[str, ...]
    """The operations as the prompt states them, such as `gets 3`."""

    @property
    def answer(self) -> int:
        """What is left at the end."""
        return self.running_values[-1]

    def direct(self) -> str:
        """The demonstration that states the answer at once."""
        return f"# {self.answer} ,"

    def step_by_step(self) -> str:
        """The demonstration that states every running value."""
        return "> " + " , ".join(str(value) for value in self.running_values)

    def copied(self) -> str:
        """The demonstration that states every change and the value after it."""
        pairs = zip(self.changes, self.running_values, strict=True)
        return "> " + " , ".join(f"{change} {value}" for change, value in pairs)


def words() -> list[str]:
    """Every word of the task, each one token."""
    numbers = [str(value) for value in range(MAX_VALUE + 1)]
    return [*SIGNS, *numbers, *NAMES, *GAINS, *LOSSES]


def make_story(rng: random.Random, num_operations: int = NUM_OPERATIONS) -> Story:
    """Draw a story; each operation is uniform over those that keep the value within bounds."""
    value = rng.randint(0, MAX_VALUE)
    text = [rng.choice(NAMES), str(value)]
    running_values, stated = [], []
    for _ in range(num_operations):
        changes = [
            change
            for change in range(-MAX_OPERAND, MAX_OPERAND + 1)
            if change != 0 and 0 <= value + change <= MAX_VALUE
        ]
        change = rng.choice(changes)
        value += change
        stated.append(f"{rng.choice(GAINS if change > 0 else LOSSES)} {abs(change)}")
        running_values.append(value)
    return Story(" ".join([*text, *stated, "?"]), tuple(running_values), tuple(stated))


def distinct_stories(rng: random.Random, num_operations: int) -> Iterator[Story]:
    """Stories without end, no prompt twice."""
    seen: set[str] = set()
    while True:
        story = make_story(rng, num_operations)
        if story.prompt not in seen:
            seen.add(story.prompt)
            yield story


def train_tokenizer() -> bytes:
    """A sentencepiece model, serialized, with one piece for each word."""
    vocabulary = words()
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(vocabulary)]),
        model_writer=model,
        model_type="word",
        vocab_size=len(vocabulary) + SPECIAL_TOKENS,
        normalization_rule_name="identity",
        pad_id=0,
        unk_id=1,
        eos_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def write_task(
    output: Path,
    seed: int,
    num_train: int,
    num_eval: int,
    num_demonstrations: int,
    num_operations: int = NUM_OPERATIONS,
    copy: bool = False,
    direct_share: float = DIRECT_SHARE,
) -> list[str]:
    """Write the three files, whose prompts are all different, and the tokenizer.

    Returns one line about each file, for people.
    """
    rng = random.Random(seed)
    stories = distinct_stories(rng, num_operations)
    evaluation = [_question(next(stories)) for _ in range(num_eval)]
    training = [_question(next(stories)) for _ in range(num_train)]
    worked = Story.copied if copy else Story.step_by_step
    demonstrations = [
        _question(story)
        | {"demonstration": story.direct() if rng.random() < direct_share else worked(story)}
        for story, _ in zip(stories, range(num_demonstrations), strict=False)
    ]
    output.mkdir(parents=True, exist_ok=True)
    tokenizer = output / "tokenizer.model"
    tokenizer.write_bytes(train_tokenizer())
    return [
        _write(output / "train.jsonl", training),
        _write(output / "eval.jsonl", evaluation),
        _write(output / "sft.jsonl", demonstrations),
        f"{tokenizer}: {len(words()) + SPECIAL_TOKENS} tokens, one for each word",
    ]


def _question(story: Story) -> dict[str, str | int]:
    """The fields of a line that the policy and the reward see."""
    return {"prompt": story.prompt, "answer": story.answer}


def _write(path: Path, lines: Sequence[dict[str, str | int]]) -> str:
    """Write JSON lines; returns what to say about them."""
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    example = f", such as {json.dumps(lines[0])}" if lines else ""
    return f"{path}: {len(lines)} lines{example}"


def main() -> None:
    """Parse the command line, write the task and say what was written."""
    parser = argparse.ArgumentParser(description="Write the arithmetic-story task.")
    parser.add_argument("--output", type=Path, required=True, help="directory to write into")
    parser.add_argument("--seed", type=int, default=0, help="the same seed, the same files")
    parser.add_argument("--num-train", type=int, default=480, help="prompts, 16 x 30 steps")
    parser.add_argument("--num-eval", type=int, default=256, help="held-out prompts")
    parser.add_argument(
        "--num-demonstrations", type=int, default=10800, help="demonstrations, 24 x 450 steps"
    )
    parser.add_argument("--num-operations", type=int, default=NUM_OPERATIONS, help="in a story")
    parser.add_argument("--copy", action="store_true", help="worked answers repeat the changes")
    parser.add_argument(
        "--direct-share", type=float, default=DIRECT_SHARE, help="demonstrations without working"
    )
    arguments = parser.parse_args()
    for line in write_task(
        arguments.output,
        arguments.seed,
        arguments.num_train,
        arguments.num_eval,
        arguments.num_demonstrations,
        arguments.num_operations,
        arguments.copy,
        arguments.direct_share,
    ):
        print(line)


if __name__ == "__main__":
    main()
