"""An answer while it grows, and when it is finished."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from raygraft.actors.engine_thread import EngineThread
from raygraft.actors.request import FinishReason, GeneratedSequence, SamplingParams, Token
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
    """ "stop" for an end-of-text token or a stop string, "length", "deadline" or "cancelled"."""
    cached_tokens: int = 0
    """Tokens of the prompt that were not computed, as an earlier request had left them."""


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

    def push(self, token: Token | None) -> bool:
        """Take a token, or the end without one; whether a stop string was reached with it."""
        piece = "" if token is None else self._detokenizer.push(token.id)
        text, stopped = self._stops.push(piece)
        if self.sequence.finish_reason is not None and not stopped:
            rest, stopped = self._stops.push(self._detokenizer.finish())
            text += rest + self._stops.finish()
        self._text.append(text)
        if text or token is not None:
            self.unread.append(Chunk(text, [] if token is None else [token.id]))
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
            cached_tokens=self.sequence.cached or 0,
        )


class Answer:
    """An answer under way: iterate over it for its chunks. Any thread may wait for it."""

    def __init__(
        self,
        thread: EngineThread,
        prompt: list[int],
        params: SamplingParams,
        tokenizer: Tokenizer,
        notify: Callable[[], None],
    ) -> None:
        """Check the request, without starting it. Raises RequestError."""
        self.request = thread.request(prompt, params, observe=self._take, notify=notify)
        self.writer = Writer(self.request.sequence, tokenizer)

    def __iter__(self) -> Iterator[Chunk]:
        """Wait for each chunk; each is handed out once. Raises what ended the engine."""
        for _ in self.request:
            yield self.writer.unread.popleft()
        while self.writer.unread:
            yield self.writer.unread.popleft()

    def wait(self) -> Completion:
        """Wait for the end. Raises what ended the engine."""
        self.request.wait()
        return self.completion()

    def completion(self) -> Completion:
        """The answer as it is now."""
        return self.writer.completion()

    def cancel(self) -> None:
        """End it soon, with what is there."""
        self.request.cancel()

    def _take(self, token: Token | None) -> bool:
        return self.writer.push(token)
