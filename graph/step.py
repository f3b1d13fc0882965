"""A step: one pass of a ragged batch through the graph, as every device sees it."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int32]
Floats = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Sampling:
    """How each wanted row of logits is sampled: one element (or one run of elements) per row.

    Random numbers are counter-based, keyed by (seed, stream, position): the same request gives
    the same tokens however the model is cut and whatever else is in the batch. The penalties read
    the `history` of token ids that comes with the row, so that no device has to remember any.
    """

    temperature: Floats
    top_p: Floats
    min_p: Floats
    repeat_penalty: Floats
    presence_penalty: Floats
    frequency_penalty: Floats
    top_k: Ints
    logprobs: Ints
    """How many of the best log probabilities are wanted."""
    seed: NDArray[np.int64]
    stream: NDArray[np.int64]
    position: Ints
    """Position of the token that is drawn."""
    history_start: Ints
    """`[rows + 1]`: row r's history is `history[history_start[r]:history_start[r + 1]]`."""
    history: Ints
    bias_start: Ints
    """`[rows + 1]`, as `history_start`, for the two arrays below."""
    bias_ids: Ints
    bias_values: Floats

    @property
    def rows(self) -> int:
        return len(self.temperature)


@dataclass(frozen=True, slots=True)
class Step:
    """One ragged batch: rows are tokens of one or many sequences.

    Within a sequence, rows stand in the order of their positions, without gaps.
    """

    tokens: Ints
    """`[rows]` token ids. `-1 - r` is not known yet: it is what the step before draws in its r-th
    row of `logit_rows`."""
    positions: Ints
    """`[rows]` position of each token in its sequence, from 0."""
    sequence: Ints
    """`[rows]` which row of `block_tables` a token belongs to."""
    block_tables: Ints
    """`[sequences, blocks]` page numbers of each sequence's cache, -1 beyond its end."""
    logit_rows: Ints
    """Rows whose logits are wanted, ascending."""
    sampling: Sampling
    """One element per wanted row."""

    @property
    def rows(self) -> int:
        return len(self.tokens)


def step_to_arrays(step: Step) -> tuple[NDArray[Any], ...]:
    """The arrays of a step, in a fixed order: what a control record carries."""
    own = tuple(getattr(step, field.name) for field in fields(Step) if field.name != "sampling")
    return own + tuple(getattr(step.sampling, field.name) for field in fields(Sampling))


def step_from_arrays(arrays: tuple[NDArray[Any], ...]) -> Step:
    """The inverse of `step_to_arrays`."""
    tokens, positions, sequence, block_tables, logit_rows, *sampling = arrays
    return Step(tokens, positions, sequence, block_tables, logit_rows, Sampling(*sampling))
