"""Tokenizers: Hugging Face directories and sentencepiece models behind one face."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from nested_reft_mcore.config.errors import UserError
from nested_reft_mcore.data.chat_template import Message, render_pieces

if TYPE_CHECKING:
    from sentencepiece import SentencePieceProcessor

GENERATION_CONFIG = "generation_config.json"
"""Where Hugging Face models keep a second list of tokens that end a completion."""
SENTENCEPIECE_FILE = "tokenizer.model"
"""What a sentencepiece model is called in a saved directory."""
HUGGING_FACE_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json", "vocab.txt")
"""A directory with one of these is read by transformers."""


class Tokenizer(Protocol):
    """Text to token ids and back, the same for every kind of tokenizer."""

    @property
    def vocab_size(self) -> int:
        """Number of ids that the model must have: the largest id plus one."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The id that is appended to a demonstration; absent if the tokenizer knows none."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Every id that ends a completion, `eos_token_id` among them; may be empty."""
        ...

    @property
    def bos_token_id(self) -> int | None:
        """The id that begins a text, for models that were trained so; absent if there is none."""
        ...

    @property
    def pad_token_id(self) -> int:
        """Filler of masked positions; an end of sequence, or 0, where there is no padding token."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with no special token added."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens, and ids that the tokenizer does not know, are skipped."""
        ...

    def token_to_id(self, token: str) -> int | None:
        """Id of the token that is spelled exactly so in the vocabulary, or None."""
        ...

    def apply_chat_template(
        self, messages: Sequence[Message], template: str | None = None
    ) -> list[int]:
        """Token ids of a chat, up to where the assistant speaks.

        `template` is Jinja text; left out, it is the tokenizer's own. Special tokens are those that
        the template writes, not those that a message spells. UserError without a template, and
        where it refuses the messages.
        """
        ...

    def save(self, directory: str | Path) -> None:
        """Write what `load_tokenizer(directory)` needs to come back as the same tokenizer."""
        ...


class HuggingFaceTokenizer:
    """A tokenizer directory as transformers reads it; nothing is downloaded, no code is run."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._tokenizer = _read_hugging_face(directory)
        self._vocabulary: dict[str, int] = self._tokenizer.get_vocab()
        self._eos_token_ids = frozenset(
            _generation_eos_ids(directory)
            | ({self.eos_token_id} if self.eos_token_id is not None else set())
        )

    @property
    def vocab_size(self) -> int:
        """Number of ids that the model must have: the largest id plus one."""
        return max(len(self._tokenizer), max(self._vocabulary.values(), default=-1) + 1)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end of sequence."""
        return self._tokenizer.eos_token_id

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The tokenizer's end of sequence and those of `generation_config.json`."""
        return self._eos_token_ids

    @property
    def bos_token_id(self) -> int | None:
        """The tokenizer's own beginning of sequence."""
        return self._tokenizer.bos_token_id

    @property
    def pad_token_id(self) -> int:
        """Filler of masked positions."""
        return _first_id(self._tokenizer.pad_token_id, self.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with no special token added."""
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens, and ids that the tokenizer does not know, are skipped."""
        # Clean-up would join "8 , 6" to "8, 6": no longer what the policy wrote.
        return str(
            self._tokenizer.decode(
                list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
        )

    def token_to_id(self, token: str) -> int | None:
        """Id of the token that is spelled exactly so in the vocabulary, or None."""
        return self._vocabulary.get(token)

    def apply_chat_template(
        self, messages: Sequence[Message], template: str | None = None
    ) -> list[int]:
        """Token ids of a chat, up to where the assistant speaks; see `Tokenizer`."""
        if template is None and self._tokenizer.chat_template is None:
            raise UserError(
                f"{self._directory}: the tokenizer has no chat template; expected `chat_template` "
                "in tokenizer_config.json, data.template_path, or data.template: none"
            )
        try:
            encoded = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                chat_template=template,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=False,
                # A special token that a message spells is text.
                sanitize_control_tokens=True,
            )
        except Exception as error:  # a template is a program: it raises what it likes
            raise UserError(
                f"{self._directory}: the chat template refused the messages "
                f"({[message.get('role') for message in messages]}): {error}"
            ) from error
        return [int(token) for token in encoded]

    def save(self, directory: str | Path) -> None:
        """Write the tokenizer, and the generation config whose end-of-sequence ids it uses."""
        target = Path(directory)
        self._tokenizer.save_pretrained(target)
        source = self._directory / GENERATION_CONFIG
        if source.is_file() and not (target / GENERATION_CONFIG).exists():
            shutil.copyfile(source, target / GENERATION_CONFIG)


class SentencePieceTokenizer:
    """A sentencepiece `.model` file."""

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        self._path = path
        self._processor: SentencePieceProcessor = SentencePieceProcessor()
        try:
            self._model = path.read_bytes()
            self._processor.LoadFromSerializedProto(self._model)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{path}: cannot be read as a tokenizer; expected a sentencepiece model: {error}"
            ) from error

    @property
    def vocab_size(self) -> int:
        """Number of pieces."""
        return self._processor.GetPieceSize()

    @property
    def eos_token_id(self) -> int | None:
        """The model's end of sequence, if it was trained with one."""
        eos = self._processor.eos_id()
        return eos if eos >= 0 else None

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """The end of sequence alone, or nothing."""
        return frozenset() if self.eos_token_id is None else frozenset({self.eos_token_id})

    @property
    def bos_token_id(self) -> int | None:
        """The model's beginning of sequence, if it was trained with one."""
        bos = self._processor.bos_id()
        return bos if bos >= 0 else None

    @property
    def pad_token_id(self) -> int:
        """Filler of masked positions."""
        pad = self._processor.pad_id()
        return _first_id(pad if pad >= 0 else None, self.eos_token_id)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with no special token added."""
        return list(self._processor.EncodeAsIds(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; special tokens, and ids that the tokenizer does not know, are skipped."""
        return self._processor.DecodeIds([token for token in ids if self._is_text(token)])

    def _is_text(self, token: int) -> bool:
        """Whether an id stands for text: known, and neither a control piece nor the unknown one."""
        # A sampled id may lie beyond the pieces where the model's vocabulary is the larger one.
        return 0 <= token < self.vocab_size and not (
            self._processor.IsControl(token) or self._processor.IsUnknown(token)
        )

    def token_to_id(self, token: str) -> int | None:
        """Id of the piece that is spelled exactly so (a leading space is U+2581), or None."""
        found = self._processor.PieceToId(token)
        return found if self._processor.IdToPiece(found) == token else None

    def apply_chat_template(
        self, messages: Sequence[Message], template: str | None = None
    ) -> list[int]:
        """Token ids of a chat, up to where the assistant speaks; see `Tokenizer`.

        A sentencepiece model carries no template of its own.
        """
        if template is None:
            raise UserError(
                f"{self._path}: a sentencepiece model has no chat template; expected "
                "data.template_path, a Hugging Face tokenizer directory, or data.template: none"
            )
        variables = {
            name: self._processor.IdToPiece(token)
            for name, token in (("bos_token", self.bos_token_id), ("eos_token", self.eos_token_id))
            if token is not None
        }
        pieces = render_pieces(template, messages, list(self._control_ids), **variables)
        ids = self.encode(pieces[0]) if pieces[0] else []
        for special, text in zip(pieces[1::2], pieces[2::2], strict=True):
            ids.append(self._control_ids[special])
            if text:
                ids += self._inner.EncodeAsIds(text)
        return ids

    @cached_property
    def _control_ids(self) -> dict[str, int]:
        """The special tokens by their spelling."""
        return {
            self._processor.IdToPiece(token): token
            for token in range(self.vocab_size)
            if self._processor.IsControl(token)
        }

    @cached_property
    def _inner(self) -> SentencePieceProcessor:
        """For text behind a special token: there a model puts no space before the first word."""
        from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

        # The stub does not know what protobuf makes at run time.
        model: Any = vars(sentencepiece_model_pb2)["ModelProto"].FromString(self._model)
        model.normalizer_spec.add_dummy_prefix = False
        inner = SentencePieceProcessor()
        inner.LoadFromSerializedProto(model.SerializeToString())
        return inner

    def save(self, directory: str | Path) -> None:
        """Write the model as `tokenizer.model`."""
        target = Path(directory)
        target.mkdir(parents=True, exist_ok=True)
        (target / SENTENCEPIECE_FILE).write_bytes(self._model)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a Hugging Face tokenizer directory, or a sentencepiece model (file or its directory).

    A directory that holds a Hugging Face tokenizer is read as one even if a sentencepiece file
    lies beside it. UserError if the path is missing or cannot be read.
    """
    path = Path(path)
    if path.is_file():
        return SentencePieceTokenizer(path)
    if not path.is_dir():
        raise UserError(
            f"{path}: not found; expected a tokenizer: a Hugging Face directory or a "
            "sentencepiece .model file"
        )
    if any((path / name).is_file() for name in HUGGING_FACE_FILES):
        return HuggingFaceTokenizer(path)
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return SentencePieceTokenizer(models[0])
    found = ", ".join(sorted(entry.name for entry in path.iterdir())[:8]) or "nothing"
    raise UserError(
        f"{path}: no tokenizer in this directory; expected one of "
        f"{', '.join(HUGGING_FACE_FILES)}, or one .model file; found {found}"
    )


def _read_hugging_face(directory: Path) -> Any:
    """The transformers tokenizer of a directory; UserError if it cannot be read."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    try:
        if (directory / "tokenizer_config.json").is_file() or (directory / "config.json").is_file():
            return AutoTokenizer.from_pretrained(str(directory), local_files_only=True)
        return PreTrainedTokenizerFast(tokenizer_file=str(directory / "tokenizer.json"))
    except Exception as error:  # the tokenizers library raises plain Exception
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{directory}: cannot be read as a tokenizer; expected a Hugging Face tokenizer "
            f"directory: {first_line}"
        ) from error


def _generation_eos_ids(directory: Path) -> set[int]:
    """`eos_token_id` of generation_config.json, which may be a number, a list or absent."""
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return set()
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path}: expected a JSON object: {error}") from error
    ids = found if isinstance(found, list) else [] if found is None else [found]
    if not all(type(token) is int for token in ids):
        raise UserError(f"{path}: eos_token_id is {found!r}; expected an integer or a list of them")
    return set(ids)


def _first_id(*candidates: int | None) -> int:
    """The first id that is there, else 0."""
    return next((token for token in candidates if token is not None), 0)
