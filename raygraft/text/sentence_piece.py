"""SentencePiece-type tokenisation: of two neighbours, those that make the best token merge first.

The same algorithm as llama.cpp's (`llama-vocab.cpp`, SPM), down to the order of equal scores.
A list of BPE merges cannot express that order (of equals, the leftmost), so it is written here.
"""

from collections.abc import Iterator
from heapq import heapify, heappop, heappush

from raygraft.graph.errors import RequestError
from raygraft.text.metadata import Metadata, read_flag
from raygraft.text.vocabulary import Vocabulary

SPACE = "▁"
_CACHED_WORDS = 50_000


class SentencePieceModel:
    """Turns text without special tokens into ids, for files of type `llama`."""

    def __init__(self, metadata: Metadata) -> None:
        self.vocabulary = Vocabulary.from_metadata(metadata, add_bos=True, llama_ids=True)
        self.adds_space = read_flag(metadata, "tokenizer.ggml.add_space_prefix", True)
        self._joins_space = _characters_before_space(self.vocabulary)
        self._words: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """The ids of `text`; characters without a token become the tokens of their bytes.

        Raises `RequestError` for a character that the vocabulary has no way to write.
        """
        ids: list[int] = []
        for word in self._cut_words(text.replace(" ", SPACE)):
            known = self._words.get(word)
            if known is None:
                known = self._encode_word(word)
                if len(self._words) >= _CACHED_WORDS:
                    self._words.clear()
                self._words[word] = known
            ids += known
        return ids

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a normal token stands for."""
        return self.vocabulary.texts[token_id].replace(SPACE, " ").encode()

    def _cut_words(self, text: str) -> Iterator[str]:
        """Cut before a space where no token could reach across, so that words can be cached."""
        start = 0
        at = text.find(SPACE, 1)
        while at > 0:
            if text[at - 1] not in self._joins_space:
                yield text[start:at]
                start = at
            at = text.find(SPACE, at + 1)
        if text:
            yield text[start:]

    def _encode_word(self, word: str) -> list[int]:
        ids = self.vocabulary.ids
        whole: list[int] = []
        for piece in self._merge(word):
            token_id = ids.get(piece)
            whole += self._encode_bytes(piece) if token_id is None else [token_id]
        return whole

    def _merge(self, word: str) -> list[str]:
        """The pieces of `word` after all merges: tokens, and characters that are none."""
        ids, scores = self.vocabulary.ids, self.vocabulary.scores
        pieces = list(word)  # a piece lives at its first character's place; "" once it is merged
        after = [*range(1, len(pieces)), -1]
        before = list(range(-1, len(pieces) - 1))

        def pair(left: int, right: int) -> tuple[float, int, int, str] | None:
            merged = pieces[left] + pieces[right]
            token_id = ids.get(merged)
            return None if token_id is None else (-scores[token_id], left, right, merged)

        waiting = [found for left in range(len(pieces) - 1) if (found := pair(left, left + 1))]
        heapify(waiting)
        while waiting:
            _, left, right, merged = heappop(waiting)
            if not pieces[left] or not pieces[right] or pieces[left] + pieces[right] != merged:
                continue  # one of the two has merged with another since
            pieces[left], pieces[right] = merged, ""
            after[left] = after[right]
            if after[left] >= 0:
                before[after[left]] = left
                if found := pair(left, after[left]):
                    heappush(waiting, found)
            if before[left] >= 0 and (found := pair(before[left], left)):
                heappush(waiting, found)
        return [piece for piece in pieces if piece]

    def _encode_bytes(self, character: str) -> list[int]:
        ids = self.vocabulary.ids
        found = [ids.get(f"<0x{byte:02X}>") for byte in character.encode()]
        known = [token_id for token_id in found if token_id is not None]
        if len(known) == len(found):
            return known
        if self.vocabulary.unknown_id is None:
            raise RequestError(f"the model's vocabulary has no token for {character!r}")
        return [self.vocabulary.unknown_id]


def _characters_before_space(vocabulary: Vocabulary) -> frozenset[str]:
    """The characters that some token has just before a space; texts are never cut there."""
    return frozenset(
        text[at - 1]
        for text in vocabulary.texts
        if SPACE in text[1:]
        for at in range(1, len(text))
        if text[at] == SPACE
    )
