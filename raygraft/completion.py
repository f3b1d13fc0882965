"""An answer while it grows, and when it is finished."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from raygraft.actors.request import FinishReason, GeneratedSequence, Token
from raygraft.text import Detokenizer, StopMatcher, Tokenizer


@dataclass(frozen=True, slots=True)
class Completion:
    """A finished answer."""

    text: str
    token_ids: list[int]
    """Generated ids; an end-of-text token is the last of them."""
    prompt_token_ids: list[int]
    logprobs: list[dict[int, float]] | None
    """For each generated token the best ids with their log probabilities, if asked for."""
    finish_reason: FinishReason | None
    """ "stop" for an end-of-text token or a stop string, "length", or "cancelled"."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What a stream yields: new text, and the tokens that it took."""

    text: str
    token_ids: list[int]


class Writer:
    """Turns a sequence's tokens into text, and looks out for stop strings."""

    def __init__(self, sequence: GeneratedSequence, tokenizer: Tokenizer) -> None:
        self.sequence = sequence
        self.unread: deque[Chunk] = deque()
        """Chunks that no stream has taken yet."""
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = StopMatcher(sequence.params.stop)
        self._text: list[str] = []

    def push(self, token: Token) -> bool:
        """Take a token; whether a stop string was reached with it."""
        text, stopped = self._stops.push(self._detokenizer.push(token.id))
        if self.sequence.finish_reason is not None and not stopped:
            rest, stopped = self._stops.push(self._detokenizer.finish())
            text += rest + self._stops.finish()
        self._text.append(text)
        self.unread.append(Chunk(text, [token.id]))
        return stopped

    def completion(self) -> Completion:
        """The answer as it is now."""
        tokens = self.sequence.tokens
        wanted = self.sequence.params.logprobs is not None
        return Completion(
            text="".join(self._text),
            token_ids=[token.id for token in tokens],
            prompt_token_ids=self.sequence.prompt,
            logprobs=[token.top_logprobs for token in tokens] if wanted else None,
            finish_reason=self.sequence.finish_reason,
        )
