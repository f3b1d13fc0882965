"""Attention over a paged cache, blocked as in FlashAttention (Dao et al., 2022).

An item of work is a run of rows of one sequence and one head of keys. The query rows of all heads
that share it are copied, scaled, to scratch memory; for each 128 positions their scores are made,
turned into weights under a running maximum, and the weighted values added. Products with the cache
are the `multiply` of `products.py`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu.cache import (
    BLOCK_SIZE,
    CACHE_TYPE,
    F32,
    KV_HEADS,
    keys_at,
    padded,
    page_of,
    values_at,
)
from raygraft.kernels.cpu.instructions import FIRST, NUMBER, OWN, POSITIONS, RUNS, B, C
from raygraft.kernels.cpu.lanes import FLOAT_BYTES, LANES
from raygraft.kernels.cpu.products import MULTIPLY_ROWS
from raygraft.kernels.cpu.vector import (
    add,
    exponential,
    get,
    get_double,
    larger,
    largest,
    load,
    multiply,
    put,
    splat,
    store,
    total,
)
from raygraft.kernels.raw import call, get_integer, word

_KEYS = 128  # positions between two looks at the maximum
_MOST_ROWS = 48  # query rows that are worked on at once, if one row has not more heads

# Own numbers of the instruction, after those that all work on caches has.
HEADS, KEY_SIZE, VALUE_SIZE, MULTIPLY = (OWN + 8 * place for place in range(3, 7))
KEY_TILE, KEYS_PAGE, VALUE_ROW, VALUES_PAGE = (FIRST + 8 * place for place in range(4))


class _Queries(NamedTuple):
    """Query rows that are worked on at once, and where what belongs to them lies."""

    row: int
    """The first row of the step; each has as many query rows as heads share a head of keys."""
    queries: int
    group: int
    head: int
    """The head of keys."""
    length: int
    """Positions that the last of them attends to."""
    rows: int
    """Scaled queries, `[queries, key_size]`."""
    mixed: int
    """Weighted values so far, `[queries, value_size in whole vectors]`."""
    scores: int
    """Scores, then weights, of some positions, `[queries, 128]`."""
    maxima: int
    weights: int
    wide: int
    """Room for a widened tile."""


def scratch_bytes(heads: int, kv_heads: int, key_size: int, value_size: int) -> int:
    """What a thread needs."""
    rows = max(_MOST_ROWS, heads // kv_heads)
    width = -(-value_size // LANES) * LANES
    wide = LANES * max(key_size, width)
    return 4 * (rows * (key_size + width + _KEYS + 2) + wide) + FLOAT_BYTES


@compiled(nogil=True)
def attend(
    i: int, step: int, x: int, out: int, scratch: int, first: int, last: int, by: int
) -> None:
    """The items `first, first + by, ...`: a run of rows and a head of keys each."""
    heads, kv_heads = word(i + HEADS), word(i + KV_HEADS)
    size, width = word(i + KEY_SIZE), padded(word(i + VALUE_SIZE))
    group = heads // kv_heads
    most = max(1, _MOST_ROWS // group)
    for item in range(first, last, by):
        run, head = item // kv_heads, item % kv_heads
        start = get_integer(word(step + RUNS) + 8 * run)
        end = start + get_integer(word(step + RUNS) + 8 * run + 4)
        for row in range(start, end, most):
            rows = min(most, end - row)
            count = rows * group
            length = get_integer(word(step + POSITIONS) + 4 * (row + rows - 1)) + 1
            mixed = scratch + 4 * size * count
            scores = mixed + 4 * width * count
            maxima = scores + 4 * _KEYS * count
            weights = maxima + 4 * count
            wide = weights + 4 * count
            queries = _Queries(
                row, count, group, head, length, scratch, mixed, scores, maxima, weights, wide
            )
            _attend_queries(i, step, x, out, queries)


@compiled(nogil=True)
def _attend_queries(i: int, step: int, x: int, out: int, q: _Queries) -> None:
    size, value_size, heads = word(i + KEY_SIZE), word(i + VALUE_SIZE), word(i + HEADS)
    width = padded(value_size)
    scale = np.float32(get_double(i + NUMBER))
    for n in range(q.queries):
        head = (q.row + n // q.group) * heads + q.head * q.group + n % q.group
        for k in range(size):
            put(q.rows + 4 * (size * n + k), get(x + 4 * (size * head + k)) * scale)
        for k in range(0, width, LANES):
            store(q.mixed + 4 * (width * n + k), splat(np.float32(0)))
        put(q.maxima + 4 * n, np.float32(-np.inf))
        put(q.weights + 4 * n, np.float32(0))

    for start in range(0, q.length, _KEYS):
        tiles = (min(_KEYS, q.length - start) + LANES - 1) // LANES
        for tile in range(tiles):
            _score(i, step, start, tile, q)
        for n in range(q.queries):
            position = get_integer(word(step + POSITIONS) + 4 * (q.row + n // q.group))
            _weigh(n, position + 1 - start, LANES * tiles, width, q)
        for tile in range(tiles):
            _mix(i, step, start, tile, width, q)

    for n in range(q.queries):
        head = (q.row + n // q.group) * heads + q.head * q.group + n % q.group
        weight = get(q.weights + 4 * n)
        for k in range(value_size):
            put(out + 4 * (value_size * head + k), get(q.mixed + 4 * (width * n + k)) / weight)


@compiled(nogil=True)
def _score(i: int, step: int, start: int, tile: int, q: _Queries) -> None:
    """Scores of the sixteen positions of a tile."""
    size, functions = word(i + KEY_SIZE), word(i + MULTIPLY)
    position = start + LANES * tile
    page = page_of(i, step, q.row, position) * word(i + KV_HEADS) + q.head
    tile_of_page = position % word(i + BLOCK_SIZE) // LANES
    at = word(i + B) + page * word(i + KEYS_PAGE) + tile_of_page * word(i + KEY_TILE)
    keys = keys_at(word(i + CACHE_TYPE), at, size, q.wide)
    for n in range(0, q.queries, MULTIPLY_ROWS):
        some = word(functions + 8 * (min(MULTIPLY_ROWS, q.queries - n) - 1))
        target = q.scores + 4 * (_KEYS * n + LANES * tile)
        own = q.rows + 4 * size * n
        call(some, (keys, FLOAT_BYTES, size, own, 4 * size, target, 4 * _KEYS, 0))


@compiled(nogil=True)
def _weigh(n: int, valid: int, count: int, width: int, q: _Queries) -> None:
    """Scores of a query to weights under its running maximum; `valid` of `count` are its own."""
    scores, mixed, maximum = q.scores + 4 * _KEYS * n, q.mixed + 4 * width * n, q.maxima + 4 * n
    valid = max(0, min(valid, count))
    for k in range(valid, count):
        put(scores + 4 * k, np.float32(-np.inf))
    before = get(maximum)
    best = splat(before)
    for k in range(0, count, LANES):
        best = larger(load(scores + 4 * k), best)
    now = largest(best)
    factor = np.float32(math.exp(before - now)) if before > -np.inf else np.float32(0)
    if factor != 1:
        for k in range(0, width, LANES):
            store(mixed + 4 * k, multiply(load(mixed + 4 * k), splat(factor)))
    sums = splat(np.float32(0))
    for k in range(0, count, LANES):
        power = exponential(add(load(scores + 4 * k), splat(-now)))
        store(scores + 4 * k, power)
        sums = add(sums, power)
    for k in range(valid, count):
        put(scores + 4 * k, np.float32(0))
    if valid > 0:
        put(q.weights + 4 * n, get(q.weights + 4 * n) * factor + total(sums))
    put(maximum, now)


@compiled(nogil=True)
def _mix(i: int, step: int, start: int, tile: int, width: int, q: _Queries) -> None:
    """Add the weighted values of the positions of a tile, no further than they are written."""
    size, kind, functions = word(i + VALUE_SIZE), word(i + CACHE_TYPE), word(i + MULTIPLY)
    position = start + LANES * tile
    positions = min(LANES, q.length - position)
    page = page_of(i, step, q.row, position) * word(i + KV_HEADS) + q.head
    row, row_bytes = position % word(i + BLOCK_SIZE), word(i + VALUE_ROW)
    at = word(i + C) + page * word(i + VALUES_PAGE) + row * row_bytes
    values = values_at(kind, at, positions, size, row_bytes, q.wide)
    step_bytes = 4 * size if kind == F32 else 4 * width
    for n in range(0, q.queries, MULTIPLY_ROWS):
        some = word(functions + 8 * (min(MULTIPLY_ROWS, q.queries - n) - 1))
        own = q.scores + 4 * (_KEYS * n + LANES * tile)
        for k in range(0, size, LANES):
            target, tile_at = q.mixed + 4 * (width * n + k), values + 4 * k
            call(
                some,
                (tile_at, step_bytes, positions, own, 4 * _KEYS, target, 4 * width, 1),
            )
