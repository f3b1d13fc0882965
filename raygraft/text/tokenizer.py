"""A model's tokenizer, built from the metadata of its GGUF file."""

from collections.abc import Callable, Iterable
from typing import Protocol

from raygraft.graph.errors import ModelFileError, RequestError
from raygraft.text.byte_level import ByteLevelModel
from raygraft.text.metadata import Metadata, read_string
from raygraft.text.sentence_piece import SentencePieceModel
from raygraft.text.special_tokens import SpecialTokens
from raygraft.text.token_kind import TokenKind
from raygraft.text.vocabulary import Vocabulary


class TextModel(Protocol):
    """What a type of tokenizer does; special tokens are not its business."""

    vocabulary: Vocabulary
    adds_space: bool  # a space goes before a text that begins, or follows a special token

    def encode(self, text: str) -> list[int]:
        """The ids of a text that has no special tokens in it."""
        ...

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes of a normal token."""
        ...


TEXT_MODELS: dict[str, Callable[[Metadata], TextModel]] = {
    "gpt2": ByteLevelModel,
    "llama": SentencePieceModel,
}

# What a reader of an answer does not see.
_HIDDEN_KINDS = (TokenKind.CONTROL, TokenKind.UNKNOWN)
_WITHOUT_BYTES = (TokenKind.UNUSED, TokenKind.UNDEFINED)


class Tokenizer:
    """Text to token ids and back, as llama.cpp does it for the same file.

    Token ids are integers from 0 to `vocabulary_size - 1`.
    """

    def __init__(
        self, model: TextModel, specials: SpecialTokens, chat_template: str | None
    ) -> None:
        self._model = model
        self._vocabulary = model.vocabulary
        self._specials = specials
        self.chat_template = chat_template

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> "Tokenizer":
        """Build the tokenizer that the key/value pairs of a GGUF file describe.

        Arrays may be lists or NumPy arrays. The keys are `tokenizer.ggml.*` and
        `tokenizer.chat_template` (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
        Raises `ModelFileError` where one is missing, of a wrong type, or names a tokenizer or
        pre-tokenizer that is not known here.
        """
        kind = read_string(metadata, "tokenizer.ggml.model")
        if kind is None or kind not in TEXT_MODELS:
            known = ", ".join(sorted(TEXT_MODELS))
            raise ModelFileError(f"tokenizer.ggml.model is {kind!r}; known here: {known}")
        model = TEXT_MODELS[kind](metadata)
        specials = SpecialTokens(model.vocabulary, metadata)
        return cls(model, specials, read_string(metadata, "tokenizer.chat_template"))

    @property
    def vocabulary_size(self) -> int:
        """The number of tokens."""
        return len(self._vocabulary.texts)

    @property
    def bos_id(self) -> int | None:
        """The beginning-of-text token, or None where the file names none."""
        return self._vocabulary.bos_id

    @property
    def eos_id(self) -> int | None:
        """The end-of-text token, or None where the file names none."""
        return self._vocabulary.eos_id

    @property
    def end_of_generation(self) -> frozenset[int]:
        """All tokens that end an answer."""
        return self._vocabulary.end_of_generation

    def is_end_of_generation(self, token_id: int) -> bool:
        """Whether the token ends an answer."""
        return token_id in self._vocabulary.end_of_generation

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        """The token ids of `text`.

        With `add_special`, the beginning and end of text are added where the file asks for them.
        With `parse_special`, control tokens written out in the text become those tokens; without
        it they are plain text, as they must be in a text that one does not trust. Lone surrogates
        count as U+FFFD. Raises `RequestError` for a character that the vocabulary cannot write.
        """
        vocabulary = self._vocabulary
        ids: list[int] = []
        if add_special and vocabulary.add_bos and vocabulary.bos_id is not None:
            ids.append(vocabulary.bos_id)
        begins = True  # the beginning counts as a special token
        for part in self._specials.cut(_without_surrogates(text), parse_special):
            if isinstance(part, int):
                ids.append(part)
            else:
                ids += self._model.encode(" " + part if begins and self._model.adds_space else part)
            begins = isinstance(part, int)
        if add_special and vocabulary.add_eos and vocabulary.eos_id is not None:
            ids.append(vocabulary.eos_id)
        return ids

    def decode(
        self, ids: Iterable[int], skip_special: bool = True, begins_text: bool = False
    ) -> str:
        """The text of `ids`, from all their bytes; those that are no UTF-8 become U+FFFD.

        `skip_special` leaves control tokens out. `begins_text` says that the ids are a whole text
        and not the continuation of one: the space that a SentencePiece-type tokenizer puts before
        a text is taken off again. Raises `RequestError` for an id outside the vocabulary.
        """
        data = b"".join(self.token_bytes(token_id, skip_special) for token_id in ids)
        if begins_text and self._model.adds_space:
            data = data.removeprefix(b" ")
        return data.decode("utf-8", "replace")

    def token_bytes(self, token_id: int, skip_special: bool = False) -> bytes:
        """The bytes of one token, which may be a part of a character only.

        Control tokens have their names for bytes, or none with `skip_special`. Raises
        `RequestError` for an id outside the vocabulary.
        """
        if not 0 <= token_id < self.vocabulary_size:
            raise RequestError(
                f"token {token_id} is outside the vocabulary of {self.vocabulary_size} tokens"
            )
        kind = self._vocabulary.kinds[token_id]
        if kind is TokenKind.NORMAL:
            return self._model.token_bytes(token_id)
        if kind in _WITHOUT_BYTES or (skip_special and kind in _HIDDEN_KINDS):
            return b""
        text = self._vocabulary.texts[token_id]
        return bytes([int(text[3:5], 16)]) if kind is TokenKind.BYTE else text.encode()


def _without_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
