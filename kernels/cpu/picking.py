"""Greedy sampling in compiled code, and on to the next step with what was drawn.

Each thread looks through its share of every row of logits; one of them joins what they found.
"""

from __future__ import annotations

import math

import numpy as np

from raygraft.graph.step import Sampling
from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu import instructions as at
from raygraft.kernels.cpu.lanes import LANES
from raygraft.kernels.cpu.vector import (
    add,
    exponential,
    get,
    get_double,
    larger,
    largest,
    load,
    put,
    put_double,
    splat,
    total,
)
from raygraft.kernels.raw import get_integer, put_integer, put_word, word

PART_BYTES = 24
"""Of what a thread finds in a row: the largest logit, its place, the sum of powers."""
_SUMMED = 256


def is_greedy(sampling: Sampling) -> bool:
    """Whether every row takes the largest logit as it is, and nobody wants others beside it."""
    plain = not len(sampling.history) and not len(sampling.bias_ids)
    return plain and not sampling.logprobs.any() and bool((sampling.temperature <= 0).all())


@compiled(nogil=True)
def _look_through(x: int, width: int, rows: int, parts: int, thread: int, threads: int) -> None:
    """A thread's share of each row of logits; runs of 256 powers are summed in float32."""
    share = (width // threads) // LANES * LANES
    first = share * thread
    last = width if thread == threads - 1 else first + share
    whole = first + (last - first) // LANES * LANES
    for row in range(rows):
        start = x + 4 * width * row
        highest, run = np.float32(-np.inf), first
        for begin in range(first, whole, _SUMMED):
            best = splat(np.float32(-np.inf))
            for k in range(begin, min(begin + _SUMMED, whole), LANES):
                best = larger(load(start + 4 * k), best)
            if largest(best) > highest:
                highest, run = largest(best), begin
        place = run
        for k in range(run, min(run + _SUMMED, whole)):
            if get(start + 4 * k) == highest:
                place = k
                break
        for k in range(whole, last):
            if get(start + 4 * k) > highest:
                highest, place = get(start + 4 * k), k
        shift = splat(-highest)
        powers = 0.0
        for begin in range(first, whole, _SUMMED):
            some = splat(np.float32(0))
            for k in range(begin, min(begin + _SUMMED, whole), LANES):
                some = add(some, exponential(add(load(start + 4 * k), shift)))
            powers += total(some)
        for k in range(whole, last):
            powers += math.exp(get(start + 4 * k) - highest)
        part = parts + PART_BYTES * (rows * thread + row)
        put_double(part, float(highest))
        put_word(part + 8, place)
        put_double(part + 16, powers)


@compiled(nogil=True)
def _join(step: int, rows: int, threads: int) -> None:
    """The id that each row takes, and its log probability. Of equal ones the first."""
    parts = word(step + at.PARTS)
    for row in range(rows):
        highest, place = -math.inf, 0
        for thread in range(threads):
            part = parts + PART_BYTES * (rows * thread + row)
            if get_double(part) > highest:
                highest, place = get_double(part), word(part + 8)
        powers = 0.0
        for thread in range(threads):
            part = parts + PART_BYTES * (rows * thread + row)
            powers += get_double(part + 16) * math.exp(get_double(part) - highest)
        put_integer(word(step + at.PICKED) + 4 * row, place)
        put(word(step + at.CHOSEN) + 4 * row, np.float32(-math.log(powers)))


@compiled(nogil=True)
def pick(i: int, step: int, rows: int, thread: int, threads: int) -> None:
    """A thread's part of sampling rows of logits: two instructions, and a meeting between them."""
    if word(i + at.KIND) == at.LOOK_THROUGH:
        width = word(i + at.OWN)
        _look_through(word(i + at.A), width, rows, word(step + at.PARTS), thread, threads)
    elif thread == 0:
        _join(step, rows, threads)


@compiled(nogil=True)
def go_on(step: int) -> None:
    """Make a step the one that follows it: each row's token is the one that was drawn for it."""
    rows = word(step + at.STEP_ROWS)
    picked, tokens, positions = (
        word(step + at.PICKED),
        word(step + at.TOKENS),
        word(step + at.POSITIONS),
    )
    for row in range(rows):
        put_integer(tokens + 4 * row, get_integer(picked + 4 * row))
        put_integer(positions + 4 * row, get_integer(positions + 4 * row) + 1)
    put_word(step + at.PICKED, picked + 4 * rows)
    put_word(step + at.CHOSEN, word(step + at.CHOSEN) + 4 * rows)
