"""Step headers: what the engine tells every device about a half-batch.

A header is three arrays, one for each data type, made in one go: a token costs the engine no more
than that, however many fields a step has.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Iterator, Sequence
from itertools import accumulate

import numpy as np

from raygraft.actors.ahead import unknown
from raygraft.actors.batch import Chunk
from raygraft.actors.part import HEADER_SIZES, SAMPLING_FLOATS
from raygraft.actors.records import Array, Record, RecordKind
from raygraft.actors.request import GeneratedSequence, SamplingParams
from raygraft.graph.step import Sampling, Step


def header_of(
    chunks: Sequence[Chunk],
    *,
    epoch: int,
    step: int,
    half_batch: int,
    half_batches: int,
    steps: int = 1,
) -> Record:
    """The header of one of a round's half-batches; without chunks, one that has nothing to do.

    Of several `steps` that follow each other it describes the first; see `ahead.py`.
    """
    arrays = _arrays(chunks, steps) if chunks else ()
    return Record(RecordKind.STEP, epoch, step, half_batch, half_batches, arrays)


def step_of(header: Record) -> Step | None:
    """The step that a header describes, over the header's memory; None without anything to do."""
    if not header.tensors:
        return None
    ints, floats, longs = header.tensors
    rows, sequences, width, wanted, history, biased, _ = ints[:HEADER_SIZES].tolist()
    part = _cut(ints[HEADER_SIZES:])
    number = _cut(floats)
    return Step(
        tokens=part(rows),
        positions=part(rows),
        sequence=part(rows),
        block_tables=part(sequences * width).reshape(sequences, width),
        logit_rows=part(wanted),
        sampling=Sampling(
            top_k=part(wanted),
            logprobs=part(wanted),
            position=part(wanted),
            history_start=part(wanted + 1),
            bias_start=part(wanted + 1),
            history=part(history),
            bias_ids=part(biased),
            temperature=number(wanted),
            top_p=number(wanted),
            min_p=number(wanted),
            repeat_penalty=number(wanted),
            presence_penalty=number(wanted),
            frequency_penalty=number(wanted),
            bias_values=number(biased),
            seed=longs,
            stream=np.zeros(wanted, np.int64),
        ),
    )


def steps_of(header: Record) -> int:
    """How many steps that follow each other it begins."""
    return int(header.tensors[0][HEADER_SIZES - 1]) if header.tensors else 1


class _cut:  # noqa: N801  # used like a function
    """Hands out an array part by part."""

    def __init__(self, whole: Array) -> None:
        self._whole = whole
        self._next = 0

    def __call__(self, count: int) -> Array:
        start = self._next
        self._next = start + count
        return self._whole[start : self._next]


def _arrays(chunks: Sequence[Chunk], steps: int) -> tuple[Array, Array, Array]:
    """In the order in which `step_of` reads them. Sequences are numbered by their place."""
    tokens: list[int] = []
    positions: list[int] = []
    owners: list[int] = []
    wanted: list[int] = []
    drawn: list[int] = []
    sampled: list[GeneratedSequence] = []
    for number, chunk in enumerate(chunks):
        sequence, start, stop = chunk.sequence, chunk.start, chunk.start + chunk.rows
        if chunk.drawn_in is None:
            tokens += sequence.ids[start:stop]
        else:
            tokens.append(unknown(chunk.drawn_in))
        positions += range(start, stop)
        owners += [number] * chunk.rows
        wanted += range(len(tokens) - chunk.logits, len(tokens))
        drawn += range(stop - chunk.logits + 1, stop + 1)
        sampled += [sequence] * chunk.logits
    width = max(len(chunk.sequence.pages) for chunk in chunks)
    params = [sequence.params for sequence in sampled]
    histories = [_history(sequence) for sequence in sampled]
    biases = [p.logit_bias for p in params]
    lists = _total(histories), _total(biases)
    sizes = (len(tokens), len(chunks), width, len(wanted), *lists, steps)
    ints = array("i", (*sizes, *tokens, *positions, *owners))
    for chunk in chunks:
        ints += chunk.sequence.pages
        ints += _UNUSED * (width - len(chunk.sequence.pages))
    ints.extend(wanted)
    ints.extend(_sampling_ints(params, drawn))
    ints.extend(accumulate(map(len, histories), initial=0))
    ints.extend(accumulate(map(len, biases), initial=0))
    for history in histories:
        ints.extend(history)
    for bias in biases:
        ints.extend(bias)
    floats = [getattr(p, name) for name in SAMPLING_FLOATS for p in params]
    floats += [value for bias in biases for value in bias.values()]
    return (
        np.frombuffer(ints, np.int32),
        np.array(floats, np.float32),
        np.array([sequence.seed for sequence in sampled], np.int64),
    )


_UNUSED = array("i", [-1])


def _sampling_ints(params: Sequence[SamplingParams], drawn: Sequence[int]) -> Iterator[int]:
    yield from (max(0, p.top_k) for p in params)
    yield from (p.logprobs or 0 for p in params)
    yield from drawn


def _total(lists: Sequence[Collection[int]]) -> int:
    return sum(map(len, lists))


def _history(sequence: GeneratedSequence) -> list[int]:
    if not sequence.params.penalises:
        return []
    last = sequence.params.repeat_last_n
    return sequence.ids if last < 0 else sequence.ids[-last:]
