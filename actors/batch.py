"""Building a step: rows of many sequences, as the arrays that every device receives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from raygraft.actors.request import GeneratedSequence
from raygraft.graph.step import Sampling, Step


@dataclass(frozen=True, slots=True)
class Chunk:
    """The next `rows` ids of a sequence that go into a step.

    The last `logits` of them need logits.
    """

    sequence: GeneratedSequence
    rows: int
    logits: int

    @classmethod
    def of(cls, sequence: GeneratedSequence, rows: int) -> Chunk:
        """A chunk that wants as many logits as the sequence has use for."""
        if sequence.scoring:
            return cls(sequence, rows, rows)
        return cls(sequence, rows, int(rows == sequence.pending))


def choose_chunks(running: Sequence[GeneratedSequence], max_rows: int) -> list[Chunk]:
    """One row of every sequence that decodes, then prompts in turn while there is room."""
    chunks = []
    left = max_rows
    for sequence in sorted(running, key=lambda sequence: sequence.pending > 1):
        rows = min(sequence.pending, left)
        if rows:
            chunks.append(Chunk.of(sequence, rows))
            left -= rows
    return chunks


def build_step(chunks: Sequence[Chunk]) -> Step:
    """The step's arrays. Sequences are numbered by their place in `chunks`."""
    tokens: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    logit_rows: list[int] = []
    sampled: list[tuple[GeneratedSequence, int]] = []
    for number, chunk in enumerate(chunks):
        start, stop = chunk.sequence.computed, chunk.sequence.computed + chunk.rows
        tokens += chunk.sequence.ids[start:stop]
        positions += range(start, stop)
        owners += [number] * chunk.rows
        logit_rows += range(len(tokens) - chunk.logits, len(tokens))
        sampled += [
            (chunk.sequence, position) for position in range(stop - chunk.logits + 1, stop + 1)
        ]
    tables = np.full((len(chunks), max(len(c.sequence.pages) for c in chunks)), -1, np.int32)
    for number, chunk in enumerate(chunks):
        tables[number, : len(chunk.sequence.pages)] = chunk.sequence.pages
    return Step(
        np.array(tokens, np.int32),
        np.array(positions, np.int32),
        np.array(owners, np.int32),
        tables,
        np.array(logit_rows, np.int32),
        _sampling(sampled),
    )


def _sampling(rows: Sequence[tuple[GeneratedSequence, int]]) -> Sampling:
    """The sampling parameters of each wanted row, and the position of the token it draws."""
    params = [sequence.params for sequence, _ in rows]
    histories = [_history(sequence) for sequence, _ in rows]
    biases = [p.logit_bias for p in params]

    def floats(values: Sequence[float]) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
        return np.array(values, np.float32)

    def ints(values: Sequence[int]) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.array(values, np.int32)

    return Sampling(
        temperature=floats([p.temperature for p in params]),
        top_p=floats([p.top_p for p in params]),
        min_p=floats([p.min_p for p in params]),
        repeat_penalty=floats([p.repetition_penalty for p in params]),
        presence_penalty=floats([p.presence_penalty for p in params]),
        frequency_penalty=floats([p.frequency_penalty for p in params]),
        top_k=ints([max(0, p.top_k) for p in params]),
        logprobs=ints([p.logprobs or 0 for p in params]),
        seed=np.array([sequence.seed for sequence, _ in rows], np.int64),
        stream=np.zeros(len(rows), np.int64),
        position=ints([position for _, position in rows]),
        history_start=ints([0, *accumulate(len(history) for history in histories)]),
        history=ints([token for history in histories for token in history]),
        bias_start=ints([0, *accumulate(len(bias) for bias in biases)]),
        bias_ids=ints([token for bias in biases for token in bias]),
        bias_values=floats([value for bias in biases for value in bias.values()]),
    )


def _history(sequence: GeneratedSequence) -> list[int]:
    if not sequence.params.penalises:
        return []
    last = sequence.params.repeat_last_n
    return sequence.ids if last < 0 else sequence.ids[-last:]
