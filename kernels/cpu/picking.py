"""Sampling in compiled code, and on to the next step with what was drawn.

Each thread looks through its share of every row of logits. Then rows are dealt out: what was found
is joined, which is all that a greedy row needs; others are drawn (see `drawing.py`).
"""

from __future__ import annotations

import math

import numpy as np

from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu import instructions as at
from raygraft.kernels.cpu.drawing import NO_WEIGHTS, SUMMED, best_of, draw, id_of, keep_best
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


@compiled(nogil=True)
def _look_through(x: int, width: int, rows: int, parts: int, thread: int, threads: int) -> None:
    """A thread's share of each row of logits; runs of powers are summed in float32."""
    share = (width // threads) // LANES * LANES
    first = share * thread
    last = width if thread == threads - 1 else first + share
    whole = first + (last - first) // LANES * LANES
    for row in range(rows):
        start = x + 4 * width * row
        highest, run = np.float32(-np.inf), first
        for begin in range(first, whole, SUMMED):
            best = splat(np.float32(-np.inf))
            for k in range(begin, min(begin + SUMMED, whole), LANES):
                best = larger(load(start + 4 * k), best)
            if largest(best) > highest:
                highest, run = largest(best), begin
        place = run
        for k in range(run, min(run + SUMMED, whole)):
            if get(start + 4 * k) == highest:
                place = k
                break
        for k in range(whole, last):
            if get(start + 4 * k) > highest:
                highest, place = get(start + 4 * k), k
        shift = splat(-highest)
        powers = 0.0
        for begin in range(first, whole, SUMMED):
            some = splat(np.float32(0))
            for k in range(begin, min(begin + SUMMED, whole), LANES):
                some = add(some, exponential(add(load(start + 4 * k), shift)))
            powers += total(some)
        for k in range(whole, last):
            powers += math.exp(get(start + 4 * k) - highest)
        part = parts + PART_BYTES * (rows * thread + row)
        put_double(part, float(highest))
        put_word(part + 8, place)
        put_double(part + 16, powers)


@compiled(nogil=True)
def _sample(x: int, width: int, step: int, row: int, rows: int, threads: int, scratch: int) -> None:
    """A row's token, its log probability, and the best ones. Of equal logits the first."""
    parts = word(step + at.PARTS)
    highest, token = -math.inf, 0
    for thread in range(threads):
        part = parts + PART_BYTES * (rows * thread + row)
        if get_double(part) > highest:
            highest, token = get_double(part), word(part + 8)
    powers = 0.0
    for thread in range(threads):
        part = parts + PART_BYTES * (rows * thread + row)
        powers += get_double(part + 16) * math.exp(get_double(part) - highest)
    own = word(step + at.SAMPLING) + 8 * at.SAMPLING_FIELDS * row
    adjusted = word(own + at.BIASED) > 0 or word(own + at.SEEN) > 0
    if adjusted or get_double(own + at.TEMPERATURE) > 0:
        token = draw(x, width, own, highest, powers, scratch)
    log_total = highest + math.log(powers)
    put_integer(word(step + at.PICKED) + 4 * row, token)
    put(word(step + at.CHOSEN) + 4 * row, np.float32(get(x + 4 * token) - log_total))
    wanted = min(word(own + at.LOGPROBS), width)
    if wanted > 0:
        first = 4 * word(step + at.BEST_COUNT) * row
        ids, best = word(step + at.BEST_IDS) + first, word(step + at.BEST) + first
        left = best_of(x, width, wanted, scratch)
        for place in range(left - 1, -1, -1):  # the last of them comes last
            token = id_of(word(scratch + 8 * place))
            put_integer(ids + 4 * place, token)
            put(best + 4 * place, np.float32(get(x + 4 * token) - log_total))
            keep_best(scratch, NO_WEIGHTS, place, float(place))


@compiled(nogil=True)
def pick(i: int, step: int, rows: int, scratch: int, thread: int, threads: int) -> None:
    """A thread's part of sampling rows of logits: two instructions, and a meeting between them."""
    x, width = word(i + at.A), word(i + at.OWN)
    if word(i + at.KIND) == at.LOOK_THROUGH:
        _look_through(x, width, rows, word(step + at.PARTS), thread, threads)
        return
    for row in range(thread, rows, threads):
        _sample(x + 4 * width * row, width, step, row, rows, threads, scratch)


@compiled(nogil=True)
def go_on(step: int) -> None:
    """Make a step the one that follows it: each row's token is the one that was drawn for it.

    Where rows are not sampled, tokens are not looked up either: only positions go on.
    """
    rows, positions = word(step + at.STEP_ROWS), word(step + at.POSITIONS)
    for row in range(rows):
        put_integer(positions + 4 * row, get_integer(positions + 4 * row) + 1)
    picked, tokens = word(step + at.PICKED), word(step + at.TOKENS)
    if picked == 0:
        return
    for row in range(rows):
        put_integer(tokens + 4 * row, get_integer(picked + 4 * row))
        position = word(step + at.SAMPLING) + 8 * at.SAMPLING_FIELDS * row + at.POSITION
        put_word(position, word(position) + 1)
    put_word(step + at.PICKED, picked + 4 * rows)
    put_word(step + at.CHOSEN, word(step + at.CHOSEN) + 4 * rows)
    best = 4 * rows * word(step + at.BEST_COUNT)
    put_word(step + at.BEST_IDS, word(step + at.BEST_IDS) + best)
    put_word(step + at.BEST, word(step + at.BEST) + best)
