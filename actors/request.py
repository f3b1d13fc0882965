"""What a caller asks for, and the sequence that grows from it."""

from __future__ import annotations

import math
import secrets
import time
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from raygraft.actors.part import MAX_LOGIT_BIAS
from raygraft.graph.builder import MAX_LOGPROBS
from raygraft.graph.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How an answer is drawn. Names and meanings follow vLLM, the filters' order llama.cpp.

    Raises RequestError for a value that makes no sense.
    """

    temperature: float = 1.0
    """0 takes the best token every time."""
    top_k: int = 0
    """Keep the best k tokens; 0 or -1 keeps all."""
    top_p: float = 1.0
    """Keep the best tokens that together reach this probability."""
    min_p: float = 0.0
    """Keep tokens at least this likely, relative to the best one."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repeat_last_n: int = 64
    """How many of the latest tokens the penalties look at; -1 is all of them."""
    seed: int | None = None
    """The same seed and request give the same tokens. None draws a seed."""
    max_tokens: int | None = 16
    """Most tokens to generate; None goes on to the end of the context."""
    max_seconds: float | None = None
    """The answer ends after so long, waiting included, with what is there."""
    logprobs: int | None = None
    """How many of the best log probabilities to report for each token."""
    stop: Sequence[str] = ()
    """Texts that end the answer; they are not part of it."""
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    """Go on after an end-of-text token."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Token id -> what is added to its logit."""

    def __post_init__(self) -> None:
        checks = {
            "temperature": (0 <= self.temperature < math.inf, "at least 0"),
            "top_k": (self.top_k >= -1, "at least 1, or 0 for all"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "from 0 to 1"),
            "repetition_penalty": (0 < self.repetition_penalty < math.inf, "above 0"),
            "presence_penalty": (math.isfinite(self.presence_penalty), "a finite number"),
            "frequency_penalty": (math.isfinite(self.frequency_penalty), "a finite number"),
            "repeat_last_n": (self.repeat_last_n >= -1, "at least 0, or -1 for all"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "from 0 to 2**63 - 1"),
            "max_tokens": (self.max_tokens is None or self.max_tokens >= 1, "at least 1"),
            "max_seconds": (self.max_seconds is None or self.max_seconds > 0, "above 0"),
            "logprobs": (0 <= (self.logprobs or 0) <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a list of texts"),
            "logit_bias": (len(self.logit_bias) <= MAX_LOGIT_BIAS, f"at most {MAX_LOGIT_BIAS} ids"),
        }
        for name, (ok, accepted) in checks.items():
            if not ok:
                raise RequestError(f"{name} is {getattr(self, name)!r}; accepted is {accepted}")

    @property
    def penalises(self) -> bool:
        """Whether the history of tokens matters."""
        return (
            self.repetition_penalty != 1
            or self.presence_penalty != 0
            or self.frequency_penalty != 0
        ) and self.repeat_last_n != 0


@dataclass(frozen=True, slots=True)
class Token:
    """One generated token, or one scored position."""

    id: int
    logprob: float
    top_logprobs: dict[int, float]
    """The best ids with their log probabilities, best first."""


@dataclass(eq=False, slots=True)
class GeneratedSequence:
    """A request on its way: its ids so far, and how many of them went into the cache."""

    number: int
    """Requests are numbered as they come: the lower number is the older."""
    prompt: list[int]
    params: SamplingParams
    scoring: bool = False
    """Every position of the prompt is scored, and nothing is generated."""
    ids: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    computed: int = 0
    """Ids that were sent to be computed; the last results may still be on their way."""
    scored: int = 0
    """Positions whose scores were asked for, where `scoring`."""
    cached: int | None = None
    """Ids of the prompt that another request had left in the cache; None before it first ran."""
    pages: array[int] = field(default_factory=lambda: array("i"))
    keys: list[bytes] = field(default_factory=list)
    """Keys of its full pages, as far as they were needed."""
    published: int = 0
    """Pages that others may share."""
    in_flight: int = 0
    """Steps that contain it and have not come back."""
    leaving: bool = False
    """It is to be set aside as soon as its steps have come back."""
    finish_reason: FinishReason | None = None
    seed: int = 0
    limit: int = 0
    """Most ids that it may grow to."""
    deadline: float | None = None
    """On the monotonic clock."""

    def __post_init__(self) -> None:
        self.ids = list(self.prompt)
        given = self.params.seed
        self.seed = secrets.randbits(63) if given is None else given
        if self.params.max_seconds is not None:
            self.deadline = time.monotonic() + self.params.max_seconds

    @property
    def pending(self) -> int:
        """Ids that are known and were not sent to be computed yet."""
        return len(self.ids) - self.computed

    @property
    def finished(self) -> bool:
        """Whether it grows no more."""
        return self.finish_reason is not None


def check_prompt(
    prompt: Sequence[int], context: int, vocabulary: int, *, scoring: bool = False
) -> None:
    """Refuse a prompt that a context cannot hold, or that is none. Raises RequestError.

    Unless it is for `scoring`, one more token must find room.
    """
    if not prompt:
        raise RequestError("the prompt is empty: there is no token to continue from")
    check_ids("the prompt", prompt, vocabulary)
    if len(prompt) + (not scoring) > context:
        raise RequestError(
            f"the prompt has {len(prompt)} tokens and one more is to be generated, "
            f"the context holds {context}"
        )


def check_ids(what: str, ids: Sequence[int], vocabulary: int) -> None:
    """Refuse ids that are no tokens. Raises RequestError."""
    wrong = [token for token in ids if not 0 <= token < vocabulary]
    if wrong:
        raise RequestError(f"{what} holds the token id {wrong[0]}; the vocabulary has {vocabulary}")
