"""Demonstrations end with the end of sequence, and only their response is learnt from."""

import json

import pytest
import torch

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import DataConfig
from nested_reft_mcore.data.demonstrations import Demonstration, collate, load_demonstrations
from nested_reft_mcore.data.prompts import load_prompts


class LetterTokenizer:
    """One id per letter of the alphabet, 0 for a space; 27 ends a sequence."""

    vocab_size = 28
    eos_token_id = 27
    eos_token_ids = frozenset({27})
    pad_token_id = 0

    def encode(self, text):
        return [0 if letter == " " else ord(letter) - 96 for letter in text]

    def decode(self, ids):
        return "".join(" " if token == 0 else chr(token + 96) for token in ids if token != 27)

    def token_to_id(self, token):
        return self.encode(token)[0]

    def apply_chat_template(self, messages):
        return [26, *self.encode(messages[-1]["content"]), 26]

    def save(self, directory):
        raise NotImplementedError


def write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


LINE = {"prompt": "ab", "answer": 1, "demonstration": "cd"}


def test_end_of_sequence_is_appended(tmp_path):
    path = write(tmp_path / "sft.jsonl", LINE)
    (demonstration,) = load_demonstrations(path, DataConfig(), LetterTokenizer()).demonstrations
    assert demonstration == Demonstration((1, 2), (3, 4, 27), f"{path}:1")


@pytest.mark.parametrize("template", ["none", "chat"])
def test_the_prompt_is_the_one_that_training_reads(tmp_path, template):
    path = write(tmp_path / "sft.jsonl", LINE)
    config = DataConfig(template=template, prompt_suffix=" x")
    demonstration = load_demonstrations(path, config, LetterTokenizer())[0]
    assert demonstration.prompt_ids == load_prompts(path, config, LetterTokenizer())[0].token_ids


def test_no_answer_is_needed_but_a_demonstration_is(tmp_path):
    path = write(tmp_path / "sft.jsonl", {"prompt": "a", "worked": "b"})
    config = DataConfig(demonstration_field="worked")
    assert len(load_demonstrations(path, config, LetterTokenizer())) == 1
    with pytest.raises(UserError, match=r"sft\.jsonl:1: no field 'demonstration'"):
        load_demonstrations(path, DataConfig(), LetterTokenizer())


def test_long_prompts_are_dropped_and_counted(tmp_path):
    path = write(tmp_path / "sft.jsonl", LINE, LINE | {"prompt": "abc"})
    found = load_demonstrations(path, DataConfig(max_prompt_length=2), LetterTokenizer())
    assert (len(found), found.num_dropped) == (1, 1)
    with pytest.raises(UserError, match="all 2 prompts are longer"):
        load_demonstrations(path, DataConfig(max_prompt_length=1), LetterTokenizer())


def test_a_tokenizer_without_end_of_sequence_is_refused(tmp_path):
    class Endless(LetterTokenizer):
        eos_token_id = None

    path = write(tmp_path / "sft.jsonl", LINE)
    with pytest.raises(UserError, match="no end-of-sequence token"):
        load_demonstrations(path, DataConfig(), Endless())


DEMONSTRATIONS = [Demonstration((1, 2), (3, 4, 27)), Demonstration((5,), (27,))]


def test_collated_rows_are_aligned_with_labels():
    batch = collate(DEMONSTRATIONS, pad_token_id=9)
    assert batch.tokens.tolist() == [[1, 2, 3, 4], [5, 9, 9, 9]]
    assert batch.labels.tolist() == [[2, 3, 4, 27], [27, 9, 9, 9]]
    assert batch.loss_mask.tolist() == [[False, True, True, True], [True, False, False, False]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3]] * 2
    assert {batch.tokens.dtype, batch.labels.dtype, batch.position_ids.dtype} == {torch.int64}
    assert batch.loss_mask.dtype == torch.bool


@pytest.mark.parametrize("row", [0, 1])
def test_masked_labels_are_the_response(row):
    batch = collate(DEMONSTRATIONS, pad_token_id=9, pad_to_multiple=8)
    labels = batch.labels[row][batch.loss_mask[row]]
    assert tuple(labels.tolist()) == DEMONSTRATIONS[row].response_ids


def test_length():
    assert collate(DEMONSTRATIONS, 0, pad_to_multiple=3).tokens.shape == (2, 6)
    assert collate(DEMONSTRATIONS, 0, pad_to_multiple=4).tokens.shape == (2, 4)
    assert collate(DEMONSTRATIONS, 0, length=7).tokens.shape == (2, 7)
    with pytest.raises(ValueError, match="length 3 must be a multiple of 1 and at least 4"):
        collate(DEMONSTRATIONS, 0, length=3)
    with pytest.raises(ValueError, match="length 7 must be a multiple of 4"):
        collate(DEMONSTRATIONS, 0, pad_to_multiple=4, length=7)


def test_nothing_to_learn_from_is_an_error():
    with pytest.raises(ValueError, match="no demonstrations"):
        collate([], 0)
    with pytest.raises(ValueError, match="empty prompt or response"):
        collate([Demonstration((1,), ())], 0)


def test_what_is_left_out_is_counted(tmp_path):
    long = {**LINE, "prompt": "abcd"}
    path = write(tmp_path / "sft.jsonl", LINE, long, {"prompt": "a"})
    config = DataConfig(broken_rows="skip", max_prompt_length=3)
    metrics = load_demonstrations(path, config, LetterTokenizer()).metrics()
    assert [metrics[f"data/num_{what}"] for what in ("prompts", "dropped", "broken")] == [1, 1, 1]
    cut = config.model_copy(update={"overlong_prompts": "truncate_left"})
    cutting = load_demonstrations(path, cut, LetterTokenizer())
    assert cutting[1].prompt_ids == (2, 3, 4)
    assert cutting.metrics()["data/num_truncated"] == 1
