"""The random steps of a check: ragged prompts, single rows, filled caches, pages used before."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from raygraft.graph.capability import Limits
from raygraft.graph.step import Floats, Ints, Sampling, Step

BLOCK_SIZE = 16
"""Tokens of a page, as in plans."""
SPARE_PAGES = 3
FULL_ROWS = 256
FAR = 4096
"""Furthest position. Beyond it, float32 angles of rotary positions differ by more than noise."""


@dataclass(frozen=True, slots=True)
class Turn:
    """A step in outline: rows of each sequence, in this order, as far as the limits allow."""

    rows: tuple[tuple[int, int], ...]
    logits: str = "last"
    """"last" row of each sequence, "all" rows, or "none", as inside a long prompt."""


PHASES: tuple[tuple[Turn, ...], ...] = (
    (
        Turn(((0, 7),)),
        Turn(((0, 1), (1, 19), (2, 5)), "all"),
        Turn(((2, 1), (0, 1), (1, 1))),
        Turn(((1, 1),)),
        Turn(((2, 4), (0, 3)), "none"),
    ),
    (
        Turn(((0, FULL_ROWS),)),
        Turn(((0, 1), (1, 55))),
        Turn(((1, 1), (0, 1))),
    ),
)
"""Sequences start anew in each phase, on the pages of the one before. Two that share many pages
show whether pages are taken to lie in a row."""


@dataclass(frozen=True, slots=True)
class NamedStep:
    """A step, and what it is in words."""

    title: str
    step: Step


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a sequence stands: its first position, and its pages."""

    start: int
    pages: Ints


def random_steps(
    rng: np.random.Generator, limits: Limits, vocabulary: int, *, stateless: bool
) -> tuple[list[NamedStep], int]:
    """The steps, and how many cache pages they need.

    Without a state sequences need not begin at position 0, and lie anywhere up to `FAR`.
    """
    phases = [_within(limits, phase) for phase in PHASES]
    totals = [_totals(phase) for phase in phases]
    starts = [
        {s: _start(rng, limits, rows) if stateless else 0 for s, rows in total.items()}
        for total in totals
    ]
    needed = [
        {s: _pages(start[s] + rows) for s, rows in total.items()}
        for total, start in zip(totals, starts, strict=True)
    ]
    blocks = max(sum(pages.values()) for pages in needed) + SPARE_PAGES
    steps: list[NamedStep] = []
    for phase, start, pages in zip(phases, starts, needed, strict=True):
        order = rng.permutation(blocks).astype(np.int32)
        cuts = np.cumsum([0, *pages.values()])
        places = {s: _Place(start[s], order[cuts[n] : cuts[n + 1]]) for n, s in enumerate(pages)}
        steps += _steps(rng, phase, places, vocabulary, len(steps))
    return steps, blocks


def _within(limits: Limits, phase: Sequence[Turn]) -> list[Turn]:
    """The turns of a phase, cut to the limits."""
    length: dict[int, int] = {}
    turns = []
    for turn in phase:
        left, rows = limits.max_rows, []
        for sequence, wanted in turn.rows:
            count = min(wanted, left, limits.context - length.get(sequence, 0))
            if sequence < limits.max_sequences and count > 0:
                rows.append((sequence, count))
                length[sequence] = length.get(sequence, 0) + count
                left -= count
        if rows:
            turns.append(Turn(tuple(rows), turn.logits))
    return turns


def _totals(phase: Sequence[Turn]) -> dict[int, int]:
    """Rows of each sequence, in all turns of a phase."""
    totals: dict[int, int] = {}
    for turn in phase:
        for sequence, count in turn.rows:
            totals[sequence] = totals.get(sequence, 0) + count
    return totals


def _start(rng: np.random.Generator, limits: Limits, rows: int) -> int:
    return int(rng.integers(0, max(0, min(limits.context, FAR) - rows), endpoint=True))


def _pages(tokens: int) -> int:
    return -(-tokens // BLOCK_SIZE)


def _steps(
    rng: np.random.Generator,
    phase: Sequence[Turn],
    places: dict[int, _Place],
    vocabulary: int,
    number: int,
) -> Iterator[NamedStep]:
    position = {sequence: place.start for sequence, place in places.items()}
    for turn in phase:
        cached = sum(position[s] - places[s].start for s, _ in turn.rows)
        positions = [range(position[s], position[s] + count) for s, count in turn.rows]
        for (sequence, _), span in zip(turn.rows, positions, strict=True):
            position[sequence] = span.stop
        pages = [
            places[s].pages[: _pages(span.stop)]
            for (s, _), span in zip(turn.rows, positions, strict=True)
        ]
        wanted = _logit_rows(turn)
        where = np.array([p for span in positions for p in span], np.int32)
        tokens = rng.integers(0, vocabulary, len(where), dtype=np.int32)
        tokens[-1] = vocabulary - 1
        step = Step(
            tokens=tokens,
            positions=where,
            sequence=np.repeat(np.arange(len(pages), dtype=np.int32), [n for _, n in turn.rows]),
            block_tables=_tables(pages),
            logit_rows=wanted,
            sampling=random_sampling(rng, where[wanted] + 1, vocabulary, number),
        )
        yield NamedStep(_title(turn, cached), step)
        number += 1


def _tables(pages: Sequence[Ints]) -> Ints:
    tables = np.full((len(pages), max(map(len, pages))), -1, np.int32)
    for row, own in zip(tables, pages, strict=True):
        row[: len(own)] = own
    return tables


def _logit_rows(turn: Turn) -> Ints:
    ends = np.cumsum([count for _, count in turn.rows], dtype=np.int32)
    rows = {"last": ends - 1, "all": np.arange(ends[-1]), "none": ends[:0]}[turn.logits]
    return rows.astype(np.int32)


def _title(turn: Turn, cached: int) -> str:
    rows = sum(count for _, count in turn.rows)
    title = "1 row" if rows == 1 else f"{rows} rows"
    if len(turn.rows) > 1:
        title += f" of {len(turn.rows)} sequences"
    return f"{title} after {cached} others" if cached else title


def random_sampling(
    rng: np.random.Generator, positions: Ints, vocabulary: int, number: int
) -> Sampling:
    """Rows in turn: the best token, the same with log probabilities, drawn, drawn with penalties
    and a bias. `number` says which comes first."""
    rows = len(positions)
    kind = (np.arange(rows) + number) % 4

    def ids(count: int) -> Ints:
        return rng.choice(vocabulary, min(count, vocabulary), replace=False).astype(np.int32)

    def starts(runs: Sequence[Ints]) -> Ints:
        return np.array([0, *accumulate(map(len, runs))], np.int32)

    def joined(runs: Sequence[Ints]) -> Ints:
        return np.concatenate([np.zeros(0, np.int32), *runs])

    histories = [np.tile(ids(12), 2) if own else ids(0) for own in kind == 3]
    biases = [ids(3) if own else ids(0) for own in kind == 3]

    def floats(*values: float) -> Floats:
        return np.array(values, np.float32)[kind]

    return Sampling(
        temperature=floats(0, 0, 0.8, 0.8),
        top_p=floats(1, 1, 0.95, 1),
        min_p=floats(0, 0, 0.05, 0),
        repeat_penalty=floats(1, 1, 1, 1.3),
        presence_penalty=floats(0, 0, 0, 0.4),
        frequency_penalty=floats(0, 0, 0, 0.2),
        top_k=np.array([0, 0, 40, 0], np.int32)[kind],
        logprobs=np.array([0, 20, 5, 0], np.int32)[kind],
        seed=rng.integers(0, 1 << 40, rows, dtype=np.int64),
        stream=np.zeros(rows, np.int64),
        position=positions.astype(np.int32),
        history_start=starts(histories),
        history=joined(histories),
        bias_start=starts(biases),
        bias_ids=joined(biases),
        bias_values=rng.standard_normal(sum(map(len, biases)), np.float32),
    )
