"""Special tokens that are written out in a text, and the text between them."""

from collections.abc import Sequence

from raygraft.text.metadata import Metadata, read_string
from raygraft.text.token_kind import TokenKind
from raygraft.text.vocabulary import Vocabulary

_WRITTEN_KINDS = (TokenKind.CONTROL, TokenKind.USER_DEFINED, TokenKind.UNKNOWN)
_SPACES = " \t\n\v\f\r"  # C's isspace, not Unicode's

# What Phi-3 files leave out: their special tokens swallow the spaces after them, but for these.
_PHI3_KEEPS_SPACES = ("<unk>", "<s>", "<|endoftext|>")


class SpecialTokens:
    """Cuts a text at the special tokens in it, in llama.cpp's order: the longest token first.

    The order matters where two overlap, and it is not that of a search from left to right.
    """

    def __init__(self, vocabulary: Vocabulary, metadata: Metadata) -> None:
        written = [
            token_id for token_id, kind in enumerate(vocabulary.kinds) if kind in _WRITTEN_KINDS
        ]
        written.sort(key=lambda token_id: -len(vocabulary.texts[token_id].encode()))
        self._all = [(vocabulary.texts[token_id], token_id) for token_id in written]
        self._user_defined = [
            (text, token_id)
            for text, token_id in self._all
            if vocabulary.kinds[token_id] is TokenKind.USER_DEFINED
        ]
        self._swallow_spaces = _swallowing(vocabulary, metadata, written)

    def cut(self, text: str, parse_control: bool) -> list[str | int]:
        """The parts of `text` in their order: token ids, and the non-empty texts between them.

        User-defined tokens are found always, control tokens only with `parse_control`.
        """
        parts: list[str | int] = [text] if text else []
        for special, token_id in self._all if parse_control else self._user_defined:
            if special in text:
                parts = self._cut_parts(parts, special, token_id)
        return parts

    def _cut_parts(self, parts: list[str | int], special: str, token_id: int) -> list[str | int]:
        cut: list[str | int] = []
        for part in parts:
            if isinstance(part, int):
                cut.append(part)
                continue
            head, *tails = part.split(special)
            if head:
                cut.append(head)
            for tail in tails:
                cut.append(token_id)
                kept = tail.lstrip(_SPACES) if token_id in self._swallow_spaces else tail
                if kept:
                    cut.append(kept)
        return cut


def _swallowing(
    vocabulary: Vocabulary, metadata: Metadata, written: Sequence[int]
) -> frozenset[int]:
    name = (read_string(metadata, "general.name") or "").lower()
    if "phi-3" not in name and "phi3" not in name:
        return frozenset()
    kept = {vocabulary.ids.get(text) for text in _PHI3_KEEPS_SPACES}
    ends = {vocabulary.ids["</s>"]} if "</s>" in vocabulary.ids else set()
    return frozenset((set(written) | ends) - kept)
