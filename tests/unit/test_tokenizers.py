"""Hugging Face directories and sentencepiece models show the same face."""

import io
import json
import random

import pytest
import sentencepiece
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.tokenizers import Tokenizer, load_tokenizer

CORPUS = [f"tom has {n} apples , and ann has {n * 7 % 31} pears ." for n in range(60)]
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'robot' %}{{ raise_exception('no robots') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TEXTS = ["tom has 5 pears", "8 , 6 . 7", "caf\u00e9 \u2603 \U0001d11e", "a\nb", "\0", "<s>x"]


def save_hugging_face(directory, template=TEMPLATE, eos="<eos>"):
    fast = FastTokenizer(models.BPE())
    fast.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<pad>", "<eos>", "<end_of_turn>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(CORPUS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=fast, eos_token=eos, pad_token="<pad>", clean_up_tokenization_spaces=True
    )
    tokenizer.chat_template = template
    tokenizer.save_pretrained(directory)
    return directory


def save_sentencepiece(path, **options):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        vocab_size=320,
        hard_vocab_limit=False,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
        **options,
    )
    path.write_bytes(model.getvalue())
    return path


@pytest.fixture(scope="module")
def hugging_face_directory(tmp_path_factory):
    directory = save_hugging_face(tmp_path_factory.mktemp("hugging_face"))
    generation = {"eos_token_id": [1, 2], "temperature": 0.7}
    (directory / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def sentencepiece_file(tmp_path_factory):
    return save_sentencepiece(tmp_path_factory.mktemp("sentencepiece") / "tiny.model")


@pytest.fixture(params=["hugging_face", "sentencepiece"])
def tokenizer(request, hugging_face_directory, sentencepiece_file) -> Tokenizer:
    is_hugging_face = request.param == "hugging_face"
    return load_tokenizer(hugging_face_directory if is_hugging_face else sentencepiece_file)


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not tokenizer.eos_token_ids & set(ids)
    assert all(0 <= token < tokenizer.vocab_size for token in ids)


def test_random_text_comes_back(tokenizer):
    rng = random.Random(0)
    for _ in range(200):
        # Sentencepiece drops one leading space.
        text = "x" + "".join(chr(rng.choice([rng.randrange(32, 127), 0x1F600])) for _ in range(9))
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_special_and_unknown_ids_decode_to_nothing(tokenizer):
    ids = tokenizer.encode("tom has 5")
    eos = tokenizer.eos_token_id
    beyond = [tokenizer.vocab_size, tokenizer.vocab_size + 1000]
    assert tokenizer.decode([*ids, eos, *beyond]) == "tom has 5"
    assert tokenizer.decode([eos]) == ""
    assert tokenizer.decode([]) == ""


def test_half_a_character_decodes_without_an_error(tokenizer):
    ids = tokenizer.encode("\u2603")
    assert "\ufffd" in tokenizer.decode(ids[:-1])


def test_token_to_id(tokenizer, hugging_face_directory, sentencepiece_file):
    assert tokenizer.token_to_id("no such token") is None
    assert load_tokenizer(hugging_face_directory).token_to_id("<end_of_turn>") == 2
    assert load_tokenizer(sentencepiece_file).token_to_id("</s>") == 2


def test_the_unknown_token_is_only_found_by_its_name(sentencepiece_file):
    tokenizer = load_tokenizer(sentencepiece_file)
    assert tokenizer.token_to_id("<unk>") == 0
    assert tokenizer.decode([0]) == ""


def test_end_of_sequence(hugging_face_directory, sentencepiece_file):
    hugging_face = load_tokenizer(hugging_face_directory)
    assert (hugging_face.eos_token_id, hugging_face.eos_token_ids) == (1, frozenset({1, 2}))
    assert hugging_face.pad_token_id == 0
    piece = load_tokenizer(sentencepiece_file)
    assert (piece.eos_token_id, piece.eos_token_ids) == (2, frozenset({2}))
    assert piece.pad_token_id == 2, "without a padding piece, the end of sequence fills"


@pytest.mark.parametrize(("stored", "ids"), [(2, {1, 2}), (None, {1}), ([], {1})])
def test_generation_config_may_hold_a_number_or_nothing(tmp_path, stored, ids):
    save_hugging_face(tmp_path)
    content = json.dumps({"eos_token_id": stored})
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    assert load_tokenizer(tmp_path).eos_token_ids == ids


@pytest.mark.parametrize(
    "content", ["[]", "{", '{"eos_token_id": "</s>"}', '{"eos_token_id": [true]}']
)
def test_a_wrong_generation_config_is_the_users_mistake(tmp_path, content):
    save_hugging_face(tmp_path)
    (tmp_path / "generation_config.json").write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json: "):
        load_tokenizer(tmp_path)


def test_no_end_of_sequence(tmp_path):
    save_hugging_face(tmp_path, eos=None)
    assert load_tokenizer(tmp_path).eos_token_ids == frozenset()
    piece = load_tokenizer(save_sentencepiece(tmp_path / "tiny.model", eos_id=-1, pad_id=3))
    assert (piece.eos_token_id, piece.eos_token_ids, piece.pad_token_id) == (None, frozenset(), 3)


def test_vocab_size_counts_every_id(hugging_face_directory, sentencepiece_file):
    spelled = json.loads((hugging_face_directory / "tokenizer.json").read_text(encoding="utf-8"))
    ids = {*spelled["model"]["vocab"].values(), *(item["id"] for item in spelled["added_tokens"])}
    assert load_tokenizer(hugging_face_directory).vocab_size == max(ids) + 1
    piece = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_file))
    assert load_tokenizer(sentencepiece_file).vocab_size == len(piece)


def test_chat_template_ends_where_the_assistant_speaks(hugging_face_directory):
    tokenizer = load_tokenizer(hugging_face_directory)
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "5 ?"}])
    assert all(type(token) is int for token in ids)
    assert tokenizer.decode(ids) == "<user>5 ?\n<assistant>"


def test_chat_template_errors_are_the_users(hugging_face_directory, sentencepiece_file, tmp_path):
    with pytest.raises(UserError, match=r"\['robot'\].*no robots"):
        load_tokenizer(hugging_face_directory).apply_chat_template(
            [{"role": "robot", "content": "5"}]
        )
    messages = [{"role": "user", "content": "5"}]
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(sentencepiece_file).apply_chat_template(messages)
    with pytest.raises(UserError, match="has no chat template"):
        load_tokenizer(save_hugging_face(tmp_path, template=None)).apply_chat_template(messages)


def test_saved_is_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy")
    copy = load_tokenizer(tmp_path / "copy")
    for text in TEXTS:
        assert copy.encode(text) == tokenizer.encode(text)
    assert copy.vocab_size == tokenizer.vocab_size
    assert copy.eos_token_ids == tokenizer.eos_token_ids
    assert copy.pad_token_id == tokenizer.pad_token_id


def test_saving_keeps_a_generation_config_that_is_there(hugging_face_directory, tmp_path):
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": 1}', encoding="utf-8")
    load_tokenizer(hugging_face_directory).save(tmp_path)
    assert load_tokenizer(tmp_path).eos_token_ids == {1}


def test_tokenizer_json_alone_is_enough(hugging_face_directory, tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(
        (hugging_face_directory / "tokenizer.json").read_bytes()
    )
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.decode(tokenizer.encode("tom has 5")) == "tom has 5"


def test_a_model_file_beside_a_config_is_found(sentencepiece_file, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(sentencepiece_file.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert load_tokenizer(tmp_path).eos_token_ids == {2}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("absent", None, "not found; expected a tokenizer"),
        ("notes.txt", "hello", "found notes.txt"),
        ("tiny.model", "hello", "expected a sentencepiece model"),
        ("tokenizer.json", "{}", "expected a Hugging Face tokenizer directory"),
        ("tokenizer.json", "hello", "expected a Hugging Face tokenizer directory"),
        ("tokenizer_config.json", "{}", "expected a Hugging Face tokenizer directory"),
    ],
)
def test_unreadable_paths_are_the_users_mistake(tmp_path, name, content, message):
    path = tmp_path
    if content is None:
        path = tmp_path / name
    else:
        (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(UserError, match=message) as caught:
        load_tokenizer(path)
    assert str(path) in str(caught.value)
