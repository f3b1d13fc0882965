"""Text from token ids that arrive one at a time."""

from codecs import getincrementaldecoder

from raygraft.text.tokenizer import Tokenizer


class Detokenizer:
    """Holds back the bytes of a character until it is whole.

    All that it gives, put together, is `Tokenizer.decode` of the same ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, which may be none.

        Raises `RequestError` for an id outside the vocabulary.
        """
        return self._decoder.decode(self._tokenizer.token_bytes(token_id, self._skip_special))

    def finish(self) -> str:
        """What was held back: U+FFFD for a character that never became whole."""
        return self._decoder.decode(b"", final=True)
