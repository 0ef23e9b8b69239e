"""Prompts from JSON lines: fields, templates, lengths, and errors that say where and what."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import pytest

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.config.schema import DataConfig
from nested_reft_mcore.data.prompts import load_prompts
from nested_reft_mcore.data.requests import read_requests
from nested_reft_mcore.data.tokenizers import Message


class ByteTokenizer:
    """One id per byte; 256 ends a sequence."""

    vocab_size = 257
    eos_token_id: int | None = 256
    eos_token_ids = frozenset({256})
    pad_token_id = 0

    def encode(self, text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(self, ids: Iterable[int]) -> str:
        return bytes(token for token in ids if token < 256).decode("utf-8", errors="replace")

    def token_to_id(self, token: str) -> int | None:
        return ord(token) if len(token) == 1 and ord(token) < 128 else None

    def apply_chat_template(self, messages: Sequence[Message]) -> list[int]:
        if any(message["role"] == "robot" for message in messages):
            raise UserError("the template knows no robot")
        turns = "".join(f"<{m['role']}>{m['content']}" for m in messages)
        return [*self.encode(turns + "<assistant>")]

    def save(self, directory: str | Path) -> None:
        raise NotImplementedError


TOKENIZER = ByteTokenizer()


def write(path: Path, *lines: str | bytes | dict) -> Path:
    encoded = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
    path.write_bytes(
        b"".join((x if isinstance(x, bytes) else x.encode("utf-8")) + b"\n" for x in encoded)
    )
    return path


@pytest.fixture
def file(tmp_path):
    return tmp_path / "data.jsonl"


def test_prompts_keep_their_order_answers_and_source(file):
    write(file, {"prompt": "2+2", "answer": 4}, "", {"prompt": "a", "answer": "x"})
    prompts = load_prompts(file, DataConfig(), TOKENIZER)
    assert len(prompts) == 2
    assert (prompts[0].text, prompts[0].answer) == ("2+2", "4")
    assert prompts[0].token_ids == (50, 43, 50)
    assert prompts[1].source == f"{file}:3"
    assert prompts.num_dropped == 0


@pytest.mark.parametrize(
    ("answer", "text"), [("43.0", "43.0"), ("43", "43"), ('"43"', "43"), ("1e-7", "1e-07")]
)
def test_an_answer_may_be_a_number(file, answer, text):
    write(file, f'{{"prompt": "a", "answer": {answer}}}')
    assert load_prompts(file, DataConfig(), TOKENIZER)[0].answer == text


def test_nested_fields(file):
    write(file, {"q": {"text": "a", "r": {"target": 7}}, "q.id": "3"})
    config = DataConfig(prompt_field="q.text", answer_field="q.r.target")
    assert load_prompts(file, config, TOKENIZER)[0].answer == "7"
    config = DataConfig(prompt_field="q.id", answer_field="q.r.target")
    assert load_prompts(file, config, TOKENIZER)[0].text == "3"


def test_template_system_prompt_and_suffix(file):
    write(file, {"prompt": "2+2", "answer": 4})
    plain = DataConfig(prompt_suffix=" Think.", system_prompt="unused without a template")
    assert load_prompts(file, plain, TOKENIZER)[0].text == "2+2 Think."
    chat = plain.model_copy(update={"template": "chat", "system_prompt": "Be brief."})
    prompt = load_prompts(file, chat, TOKENIZER)[0]
    assert prompt.text == "<system>Be brief.<user>2+2 Think.<assistant>"
    assert prompt.token_ids == tuple(TOKENIZER.encode(prompt.text))


def test_long_prompts_are_dropped_and_counted(file):
    lines = [{"prompt": "x" * length, "answer": length} for length in (3, 5, 4, 9)]
    write(file, *lines)
    prompts = load_prompts(file, DataConfig(max_prompt_length=4), TOKENIZER)
    assert [prompt.answer for prompt in prompts.prompts] == ["3", "4"]
    assert prompts.num_dropped == 2
    with pytest.raises(UserError, match=r"all 4 prompts.*max_prompt_length = 2.*shortest has 3"):
        load_prompts(file, DataConfig(max_prompt_length=2), TOKENIZER)


def test_limit_counts_lines_and_reads_no_further(file):
    write(file, {"prompt": "a", "answer": 1}, "", {"prompt": "b", "answer": 2}, "not JSON")
    assert len(load_prompts(file, DataConfig(limit=2), TOKENIZER)) == 2


def test_byte_order_mark_and_windows_line_ends(file):
    write(file, b'\xef\xbb\xbf{"prompt": "a", "answer": 1}\r')
    assert load_prompts(file, DataConfig(), TOKENIZER)[0].text == "a"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{prompt: 2}", r":2: not JSON: found '\{prompt: 2\}'"),
        ("{" + "x" * 500, r":2: not JSON: found '\{x{50,60}"),
        ("[" * 100_000, r":2: not JSON"),
        ('{"prompt": "a", "answer": NaN}', r":2: not JSON.*NaN is not a JSON value"),
        ('{"prompt": "a", "answer": ' + "9" * 5000 + "}", r":2: not JSON"),
        ("[1]", r":2: found \[1\]; expected a JSON object"),
        (b'{"prompt": "\xff"}', r":2: not UTF-8"),
        (
            '{"question": "a", "answer": 1}',
            r":2: no field 'prompt'; found \['answer', 'question'\]",
        ),
        ('{"prompt": "a", "answer": null}', r":2: field 'answer' is null; expected a value"),
        ('{"prompt": "a", "answer": 1e400}', r":2: not JSON: .*; 1e400 is too large for a number"),
        ('{"prompt": "a", "prompt": "b"}', r":2: not JSON: .*; the key 'prompt' stands twice"),
        ('{"prompt": 5, "answer": 1}', r":2: field 'prompt' is 5; expected a string"),
        ('{"prompt": "", "answer": 1}', r":2: the prompt is '' and has no tokens"),
        ('{"prompt": "\\ud800", "answer": 1}', r":2: field 'prompt'.*lone surrogates"),
        ('{"prompt": "a", "answer": [1]}', r":2: field 'answer' is \[1\]; expected a number or a"),
        ('{"prompt": "a", "answer": true}', r":2: field 'answer' is True; expected a number or a"),
    ],
)
def test_a_wrong_line_is_named(file, line, message):
    write(file, {"prompt": "a", "answer": 1}, line)
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(file, DataConfig(), TOKENIZER)
    assert str(file) in str(caught.value)
    assert len(str(caught.value)) < 500


def test_missing_empty_and_unreadable_files(file, tmp_path):
    with pytest.raises(UserError, match=r"data\.jsonl: cannot be read.*No such file"):
        load_prompts(file, DataConfig(), TOKENIZER)
    with pytest.raises(UserError, match="cannot be read"):
        load_prompts(tmp_path, DataConfig(), TOKENIZER)
    write(file, "", "  ")
    with pytest.raises(UserError, match="the data set is empty"):
        load_prompts(file, DataConfig(), TOKENIZER)


def test_requests_of_each_kind(file):
    write(
        file,
        {"prompt": "a", "answer": 3},
        {"messages": [{"role": "user", "content": "b"}]},
        {"prompt_token_ids": [99, 256], "prompt": None},
    )
    requests = read_requests(file, TOKENIZER)
    assert [request.text for request in requests] == ["a", "<user>b<assistant>", "c"]
    assert requests[2].token_ids == (99, 256)
    assert [request.answer for request in requests] == ["3", None, None]


def test_requests_may_use_ids_of_the_models_larger_vocabulary(file):
    write(file, {"prompt_token_ids": [299]})
    assert read_requests(file, TOKENIZER, vocab_size=300)[0].token_ids == (299,)
    with pytest.raises(UserError, match=r":1: field 'prompt_token_ids' is 299.*from 0 to 298"):
        read_requests(file, TOKENIZER, vocab_size=299)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"text": "a"}, r"found \['text'\]; expected exactly one of prompt, messages"),
        ({"prompt": "a", "messages": []}, r"found \['prompt', 'messages'\]; expected exactly one"),
        ({"prompt": ""}, "has no tokens"),
        ({"prompt_token_ids": []}, "has no tokens"),
        ({"prompt_token_ids": "5"}, "expected a list"),
        ({"prompt_token_ids": [5, -1]}, "is -1; expected token ids from 0 to 256"),
        ({"prompt_token_ids": [True]}, "is True; expected token ids"),
        ({"messages": "hello"}, "expected a list"),
        ({"messages": ["hello"]}, "expected turns of the form"),
        ({"messages": [{"role": "user"}]}, "expected turns of the form"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "lone surrogates"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "the template knows no robot"),
    ],
)
def test_a_wrong_request_is_named(file, line, message):
    write(file, line)
    with pytest.raises(UserError, match=message) as caught:
        read_requests(file, TOKENIZER)
    assert f"{file}:1" in str(caught.value)
