"""What a GGUF file says about its tokens: texts, kinds, scores and the special ids."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from raygraft.graph.errors import ModelFileError
from raygraft.text.end_of_generation import find_end_of_generation
from raygraft.text.metadata import (
    Metadata,
    read_flag,
    read_integers,
    read_scores,
    read_strings,
    read_token_id,
)
from raygraft.text.token_kind import TokenKind

_KINDS = {int(kind): kind for kind in TokenKind}


@dataclass(frozen=True, slots=True)
class Vocabulary:
    """The tokens of a model, by id. All sequences have one entry per token."""

    texts: Sequence[str]
    kinds: Sequence[TokenKind]
    scores: Sequence[float]
    ids: Mapping[str, int]
    bos_id: int | None
    eos_id: int | None
    unknown_id: int | None
    add_bos: bool
    add_eos: bool
    end_of_generation: frozenset[int]

    @classmethod
    def from_metadata(cls, metadata: Metadata, *, add_bos: bool, llama_ids: bool) -> "Vocabulary":
        """Read the vocabulary out of a GGUF's key/value pairs.

        `add_bos` is what holds where the file does not say. `llama_ids` gives the ids that
        SentencePiece-type files may leave out (unknown 0, begin 1, end 2). Raises
        `ModelFileError` where tokens are missing, double or of unequal number, or where a
        beginning or end of text is to be added and the file names none.
        """
        texts = _texts(metadata)
        size = len(texts)
        ids = {text: token_id for token_id, text in enumerate(texts)}
        if len(ids) != size:
            raise ModelFileError(
                f"tokenizer.ggml.tokens: {_first_double(texts)} stands there twice"
            )
        kinds = _kinds(metadata, size)

        def special(name: str, default: int) -> int | None:
            token_id = read_token_id(metadata, f"tokenizer.ggml.{name}_token_id", size)
            return default if token_id is None and llama_ids and default < size else token_id

        eos_id = special("eos", 2)
        vocabulary = cls(
            texts=texts,
            kinds=kinds,
            scores=_scores(metadata, size),
            ids=ids,
            bos_id=special("bos", 1),
            eos_id=eos_id,
            unknown_id=special("unknown", 0),
            add_bos=read_flag(metadata, "tokenizer.ggml.add_bos_token", add_bos),
            add_eos=read_flag(metadata, "tokenizer.ggml.add_eos_token", False),
            end_of_generation=find_end_of_generation(metadata, ids, kinds, eos_id),
        )
        if vocabulary.add_bos and vocabulary.bos_id is None:
            raise ModelFileError("a beginning of text is to be added, but bos_token_id is not set")
        if vocabulary.add_eos and vocabulary.eos_id is None:
            raise ModelFileError("an end of text is to be added, but eos_token_id is not set")
        return vocabulary


def _texts(metadata: Metadata) -> list[str]:
    texts = read_strings(metadata, "tokenizer.ggml.tokens")
    if not texts:
        raise ModelFileError("tokenizer.ggml.tokens: the file holds no vocabulary")
    if "" in texts:  # llama.cpp gives such tokens a name, for each must have one of its own
        texts = [text or f"[EMPTY_{token_id}]" for token_id, text in enumerate(texts)]
    return texts


def _kinds(metadata: Metadata, size: int) -> list[TokenKind]:
    values = read_integers(metadata, "tokenizer.ggml.token_type")
    if values is None:
        return [TokenKind.NORMAL] * size
    _check_length("tokenizer.ggml.token_type", len(values), size)
    return [_KINDS.get(value, TokenKind.UNDEFINED) for value in values[:size]]


def _scores(metadata: Metadata, size: int) -> list[float]:
    values = read_scores(metadata, "tokenizer.ggml.scores")
    if values is None:
        return [0.0] * size
    _check_length("tokenizer.ggml.scores", len(values), size)
    return values[:size]


def _check_length(key: str, length: int, size: int) -> None:
    if length < size:
        raise ModelFileError(f"{key} has {length} entries for {size} tokens")


def _first_double(texts: Sequence[str]) -> str:
    seen: set[str] = set()
    for text in texts:
        if text in seen:
            return repr(text)
        seen.add(text)
    raise AssertionError("no text stands there twice")
