"""The files that make a tokenizer, and the special tokens that they define."""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.hf.config import read_json_object

SENTENCEPIECE_FILE = "tokenizer.model"
GENERATION_CONFIG_FILE = "generation_config.json"
CHECKPOINT_TOKENIZER_DIRECTORY = "tokenizer"
"""Where in a checkpoint its tokenizer is kept."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
"""A directory with one of these is read by transformers."""
HUGGING_FACE_FILES = (
    *TOKENIZER_FILES,
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


@dataclass(frozen=True)
class SpecialTokens:
    """Ids under the names that `config.json` and `generation_config.json` give them."""

    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy a tokenizer, and the generation config beside it, into directory `target`.

    Without a generation config one is written that knows the special tokens. A sentencepiece model
    is copied as it is; whether transformers' AutoTokenizer reads it rightly depends on its kind
    (a `word` model it does not), sentencepiece and `load_tokenizer` always do.

    Args:
        source: a directory, or a sentencepiece `.model` file, which becomes `tokenizer.model`.
        target: an existing directory.

    Raises:
        UserError: there is no tokenizer in `source`.
    """
    sentencepiece = _sentencepiece_model(source)
    hugging_face = [source / name for name in HUGGING_FACE_FILES if (source / name).is_file()]
    if not has_tokenizer(source):
        raise UserError(
            f"{source}: no tokenizer; expected a directory with one of "
            f"{', '.join(TOKENIZER_FILES)}, {SENTENCEPIECE_FILE}, or a .model file"
        )
    if sentencepiece is not None:
        shutil.copyfile(sentencepiece, target / SENTENCEPIECE_FILE)
    for path in hugging_face:
        shutil.copyfile(path, target / path.name)
    if (source / GENERATION_CONFIG_FILE).is_file():
        shutil.copyfile(source / GENERATION_CONFIG_FILE, target / GENERATION_CONFIG_FILE)
    else:
        content = json.dumps(asdict(special_tokens(source)), indent=2, sort_keys=True)
        (target / GENERATION_CONFIG_FILE).write_text(content + "\n", encoding="utf-8")


def has_tokenizer(source: Path) -> bool:
    """Whether `source` is a sentencepiece model or a directory with a tokenizer in it."""
    is_hugging_face = any((source / name).is_file() for name in TOKENIZER_FILES)
    return is_hugging_face or _sentencepiece_model(source) is not None


def checkpoint_tokenizer(checkpoint: Path) -> Path | None:
    """The tokenizer that a checkpoint carries beside its weights, if it does."""
    directory = checkpoint / CHECKPOINT_TOKENIZER_DIRECTORY
    return directory if has_tokenizer(directory) else None


def special_tokens(source: Path) -> SpecialTokens:
    """Special tokens of the model or tokenizer in `source`, a directory or a `.model` file.

    A model's own `generation_config.json` or `config.json` comes first, because it may end a
    completion at several tokens; else the tokenizer says.
    """
    for name in (GENERATION_CONFIG_FILE, "config.json"):
        path = source / name
        content = read_json_object(path) if path.is_file() else {}
        if content.get("eos_token_id") is not None:
            return SpecialTokens(
                content.get("bos_token_id"), content["eos_token_id"], content.get("pad_token_id")
            )
    if any((source / name).is_file() for name in TOKENIZER_FILES):
        return _hugging_face_tokens(source)
    sentencepiece = _sentencepiece_model(source)
    return SpecialTokens() if sentencepiece is None else _sentencepiece_tokens(sentencepiece)


def _sentencepiece_model(source: Path) -> Path | None:
    """The sentencepiece model that `source` is or holds."""
    if source.is_file():
        return source
    if (source / SENTENCEPIECE_FILE).is_file():
        return source / SENTENCEPIECE_FILE
    models = list(source.glob("*.model"))
    return models[0] if len(models) == 1 else None


def _hugging_face_tokens(source: Path) -> SpecialTokens:
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    tokenizer: Any
    if (source / "tokenizer_config.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(str(source), local_files_only=True)
    else:
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"))
    return SpecialTokens(tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)


def _sentencepiece_tokens(path: Path) -> SpecialTokens:
    from sentencepiece import SentencePieceProcessor

    processor: Any = SentencePieceProcessor()
    processor.Load(str(path))
    ids = (processor.bos_id(), processor.eos_id(), processor.pad_id())
    # sentencepiece says -1 for a token that the model does not have.
    return SpecialTokens(*(one if one >= 0 else None for one in ids))
