"""Byte-level BPE: a text's bytes as visible characters, cut into words, pairs merged by rank.

The scheme of GPT-2 (https://huggingface.co/docs/tokenizers/components, `ByteLevel`).
"""

from collections.abc import Sequence
from typing import cast

from tokenizers import Regex, models
from tokenizers import Tokenizer as Pipeline
from tokenizers.pre_tokenizers import ByteLevel, Split
from tokenizers.pre_tokenizers import Sequence as Steps

from raygraft.graph.errors import ModelFileError
from raygraft.text.metadata import Metadata, read_string, read_strings
from raygraft.text.pre_tokenizers import PreTokenizer, find_pre_tokenizer
from raygraft.text.vocabulary import Vocabulary

# No word can be this one: spaces are written as another character.
_MISSING_BYTE = "missing byte"


class ByteLevelModel:
    """Turns text without special tokens into ids, for files of type `gpt2`."""

    def __init__(self, metadata: Metadata) -> None:
        pre_tokenizer = find_pre_tokenizer(read_string(metadata, "tokenizer.ggml.pre"))
        self.vocabulary = Vocabulary.from_metadata(
            metadata, add_bos=pre_tokenizer.add_bos, llama_ids=False
        )
        self.adds_space = False
        self._bytes = byte_characters()
        self._missing_byte = len(self.vocabulary.texts)
        self._pipeline = Pipeline(self._build_merger(metadata, pre_tokenizer))
        self._pipeline.pre_tokenizer = _build_steps(pre_tokenizer.patterns)

    def encode(self, text: str) -> list[int]:
        """The ids of `text`. Bytes that have no token are left out, as in llama.cpp."""
        ids: list[int] = self._pipeline.encode(text, add_special_tokens=False).ids
        if self._missing_byte in ids:
            return [token_id for token_id in ids if token_id != self._missing_byte]
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a normal token stands for."""
        text = self.vocabulary.texts[token_id]
        try:
            return bytes(map(self._bytes.__getitem__, text))
        except KeyError:
            return text.encode()  # not in the byte alphabet: a token that somebody added

    def _build_merger(self, metadata: Metadata, pre_tokenizer: PreTokenizer) -> models.BPE:
        lines = read_strings(metadata, "tokenizer.ggml.merges")
        if lines is None:
            raise ModelFileError("tokenizer.ggml.merges: a tokenizer of type gpt2 needs merges")
        merges = _read_merges(lines)
        try:
            return models.BPE(
                # A byte without a token keeps its place, or its neighbours would be merged.
                vocab={**self.vocabulary.ids, _MISSING_BYTE: self._missing_byte},
                merges=merges,
                unk_token=_MISSING_BYTE,
                fuse_unk=False,
                ignore_merges=pre_tokenizer.ignore_merges,
            )
        except Exception as error:  # the library raises nothing narrower
            raise ModelFileError(f"tokenizer.ggml.merges: {error}") from error


def byte_characters() -> dict[str, int]:
    """The byte that each character of the alphabet stands for; all 256 of them."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    characters = {chr(byte): byte for byte in visible}
    return characters | {chr(256 + place): byte for place, byte in enumerate(hidden)}


def _build_steps(patterns: Sequence[str]) -> Steps:
    cuts = [Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    return Steps([*cuts, ByteLevel(add_prefix_space=False, use_regex=False)])


def _read_merges(lines: Sequence[str]) -> list[tuple[str, str]]:
    """The pairs in the order of their rank; a pair that stands there twice has its first rank."""
    distinct = list(dict.fromkeys(lines))
    pairs = [tuple(line.split(" ", 1)) for line in distinct]
    for line, pair in zip(distinct, pairs, strict=True):
        if len(pair) != 2:
            raise ModelFileError(f"tokenizer.ggml.merges: {line!r} is not a pair")
    return cast(list[tuple[str, str]], pairs)
