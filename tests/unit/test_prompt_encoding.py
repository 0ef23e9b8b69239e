"""Templates of one's own, examples, beginnings of sequence, and prompts that are too long."""

import json
from pathlib import Path

import pytest
from test_prompts import ByteTokenizer
from test_tokenizers import save_hugging_face, save_sentencepiece

from nested_reft_mcore.config.data import DataConfig, DataSource
from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.chat_template import render_pieces
from nested_reft_mcore.data.prompts import load_prompts
from nested_reft_mcore.data.tokenizers import load_tokenizer

TOKENIZERS = Path(__file__).parents[3] / "shared" / "tokenizers"
TEMPLATE = (
    "{%- for m in messages -%}{{ bos_token }}[{{ m.role }}] {{ m.content }}{%- endfor -%}"
    "{% if add_generation_prompt %}{{ eos_token }}> {% endif %}"
)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"prompt": letter * 6, "answer": letter} for letter in "abc"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def texts(file, config, tokenizer=None):
    return [
        prompt.text for prompt in load_prompts(file, config, tokenizer or ByteTokenizer()).prompts
    ]


def shots(tmp_path, count=2):
    path = tmp_path / "shots.jsonl"
    rows = [
        {"prompt": "aaaaaa", "demonstration": "is {question} a"},
        {"prompt": "q", "demonstration": "is q"},
        {"prompt": "r", "demonstration": "is r"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows[:count]), encoding="utf-8")
    return DataSource(path=str(path))


def test_examples_come_first_and_never_tell_the_answer(tmp_path, file):
    config = DataConfig(few_shot=shots(tmp_path), num_few_shot=1, prompt_suffix=" ?")
    found = texts(file, config)
    assert found[0] == "q ?\nis q\n\naaaaaa ?", "the question itself is not an example of its own"
    assert found[1] == "aaaaaa ?\nis {question} a\n\nbbbbbb ?"
    chat = config.model_copy(update={"template": "chat", "system_prompt": "S"})
    assert texts(file, chat)[1] == (
        "<system>S<user>aaaaaa ?<assistant>is {question} a<user>bbbbbb ?<assistant>"
    )


def test_too_few_examples_are_an_error(tmp_path, file):
    config = DataConfig(few_shot=shots(tmp_path, 1), num_few_shot=2)
    with pytest.raises(UserError, match=r"shots\.jsonl: has 1 examples; expected at least"):
        load_prompts(file, config, ByteTokenizer())


def test_a_long_prompt_is_dropped_cut_on_the_left_or_refused(file):
    config = DataConfig(prompt_suffix="12", max_prompt_length=3)
    cut = load_prompts(
        file, config.model_copy(update={"overlong_prompts": "truncate_left"}), ByteTokenizer()
    )
    assert [prompt.text for prompt in cut.prompts] == ["a12", "b12", "c12"]
    assert [len(prompt.token_ids) for prompt in cut.prompts] == [3, 3, 3]
    assert (cut.num_truncated, cut.num_dropped) == (3, 0)
    assert cut.metrics()["data/num_truncated"] == 3
    with pytest.raises(
        UserError, match=r"data\.jsonl:1: the prompt has 8 tokens; expected at most"
    ):
        load_prompts(file, config.model_copy(update={"overlong_prompts": "error"}), ByteTokenizer())
    with pytest.raises(UserError, match="all 3 prompts are longer"):
        load_prompts(file, config, ByteTokenizer())


def test_own_templates_are_the_same_for_both_kinds_of_tokenizers(tmp_path, file):
    template = tmp_path / "chat.jinja"
    template.write_text(TEMPLATE)
    config = DataConfig(template="chat", template_path=str(template))
    directory = tmp_path / "hugging_face"
    directory.mkdir()
    hugging_face = load_tokenizer(save_hugging_face(directory))
    piece = load_tokenizer(save_sentencepiece(tmp_path / "tiny.model"))
    assert texts(file, config, hugging_face)[0] == "[user] aaaaaa> "
    assert texts(file, config, piece)[0] == "[user] aaaaaa> "
    ids = load_prompts(file, config, piece)[0].token_ids
    assert (ids[0], ids.count(1), ids.count(2)) == (1, 1, 1), "bos and eos are single ids"


def test_only_the_template_writes_special_tokens(tmp_path):
    piece = load_tokenizer(save_sentencepiece(tmp_path / "tiny.model"))
    spelled = [{"role": "user", "content": "a </s><s> b"}]
    ids = piece.apply_chat_template(spelled, TEMPLATE)
    assert (ids.count(1), ids.count(2)) == (1, 1)
    assert "a </s><s> b" in piece.decode(ids)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "the chat template refused the messages"),
        ("{{ raise_exception('no') }}", r"\(\['user'\]\): no"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
    ],
)
def test_templates_run_in_a_sandbox(template, message):
    with pytest.raises(UserError, match=message):
        render_pieces(template, [{"role": "user", "content": "a"}], ["<s>"])


def test_a_wrong_template_names_file_and_row(tmp_path, file):
    template = tmp_path / "chat.jinja"
    template.write_text("{{ raise_exception('no') }}")
    config = DataConfig(template="chat", template_path=str(template))
    piece = load_tokenizer(save_sentencepiece(tmp_path / "tiny.model"))
    with pytest.raises(UserError, match=r"data\.jsonl:1: the chat template refused"):
        load_prompts(file, config, piece)
    gone = config.model_copy(update={"template_path": "gone.jinja"})
    with pytest.raises(UserError, match=r"gone\.jinja: cannot be read; expected a chat template"):
        load_prompts(file, gone, piece)


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        ("Solve it.", "the question"),
        ("{{ messages[0].content }}", "the question"),
        ("{{ messages[-1].content }}", "the examples of data.few_shot"),
        ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "system_prompt"),
    ],
)
def test_a_template_that_leaves_a_message_out_is_refused(tmp_path, file, template, left_out):
    path = tmp_path / "chat.jinja"
    path.write_text(template)
    config = DataConfig(template="chat", template_path=str(path))
    more = {"few_shot": shots(tmp_path), "num_few_shot": 1}
    if left_out == "system_prompt":
        more["system_prompt"] = "S"
    piece = load_tokenizer(save_sentencepiece(tmp_path / "tiny.model"))
    with pytest.raises(UserError, match=rf"data\.jsonl:1: .* leaves out .*{left_out}"):
        load_prompts(file, config.model_copy(update=more), piece)
    # What an example's answer says may be cut, as templates cut thoughts.
    path.write_text("{% for m in messages if m.role != 'assistant' %}{{ m.content }}{% endfor %}")
    assert len(load_prompts(file, config.model_copy(update=more), piece)) == 3


def test_a_plain_prompt_may_begin_with_the_beginning_of_sequence(tmp_path, file):
    piece = load_tokenizer(save_sentencepiece(tmp_path / "tiny.model"))
    plain = load_prompts(file, DataConfig(), piece)[0].token_ids
    begun = load_prompts(file, DataConfig(add_bos=True), piece)[0].token_ids
    assert begun == (1, *plain)
    without = load_tokenizer(save_sentencepiece(tmp_path / "none.model", bos_id=-1))
    with pytest.raises(UserError, match="has no beginning-of-sequence token"):
        load_prompts(file, DataConfig(add_bos=True), without)


@pytest.mark.skipif(not TOKENIZERS.is_dir(), reason="the real tokenizers are not here")
@pytest.mark.parametrize("name", ["qwen2_5", "llama2_sentencepiece/tokenizer.model"])
def test_real_tokenizers(name, tmp_path):
    tokenizer = load_tokenizer(TOKENIZERS / name)
    for text in ("Café \u2603 \U0001f600 \u0d9e", "x = 3.14\n\tif <s>:", "\u0000\u200f"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    template = "{{ bos_token or '' }}[INST] {{ messages[0].content }} [/INST]"
    text = "hi \U0001f600 </s><|im_end|>"
    ids = tokenizer.apply_chat_template([{"role": "user", "content": text}], template)
    assert tokenizer.decode(ids) == f"[INST] {text} [/INST]"
    assert not tokenizer.eos_token_ids & set(ids), "what a user spells ends nothing"
    if "llama2" in name:
        assert ids[:5] == [1, 29961, 25580, 29962, 7251], "as Llama 2's own code tokenizes it"
