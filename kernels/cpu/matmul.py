"""Products with packed weights, and what is fused to them: bias, residual sum, gate.

Rows go through the weights eight at a time, so many of them before the next tile that they stay in
the cache. The products of a tile land in scratch memory, and leave it finished.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu.formats import Format
from raygraft.kernels.cpu.instructions import (
    COLUMNS,
    FIRST,
    FUNCTIONS,
    ROUNDED,
    SECOND,
    SUMS,
    TILE_BYTES,
    WEIGHT,
    WIDTH,
    B,
    C,
)
from raygraft.kernels.cpu.lanes import FLOAT_BYTES, LANES
from raygraft.kernels.cpu.products import DOT_ROWS, ROUND
from raygraft.kernels.cpu.rounding import RECORD_BYTES, RECORD_COLUMNS
from raygraft.kernels.cpu.vector import (
    add,
    divide,
    exponential,
    get,
    load,
    multiply,
    put,
    splat,
    store,
    total,
)
from raygraft.kernels.raw import call, word

_MOST_ROWS = 16 * DOT_ROWS  # that go through a tile before the next one
_CACHED = 2**18  # bytes of their x: half of a small second-level cache
_RESULTS = _MOST_ROWS * FLOAT_BYTES
_PREPARED = 2 * _RESULTS
"""Where, in a thread's scratch memory, what is prepared of x follows two sets of results."""


def scratch_bytes(columns: int, rows: int, kind: Format) -> int:
    """What a thread needs for products of so many rows with weights of a format.

    Two weights that are gated share rounded rows, but not sums.
    """
    sums = 4 * (columns // LANES) * rows
    if kind.in_pairs:
        return _PREPARED + RECORD_BYTES * (columns // RECORD_COLUMNS) * rows + sums
    return _PREPARED + (2 * sums if kind.has_offset else 0)


@compiled(nogil=True)
def _prepared_bytes(weight: int, columns: int) -> int:
    """Of a row of x, for a weight."""
    sums = word(weight + SUMS)
    if sums == ROUNDED:
        return RECORD_BYTES * (columns // RECORD_COLUMNS)
    return 4 * (columns // LANES) if sums > 0 else 0


@compiled(nogil=True)
def silu_times(a: Any, b: Any) -> Any:
    """silu(a) * b, of vectors."""
    one = splat(np.float32(1))
    sigmoid = divide(one, add(one, exponential(multiply(a, splat(np.float32(-1))))))
    return multiply(multiply(a, sigmoid), b)


@compiled(nogil=True)
def _group_sums(x: int, rows: int, columns: int, group: int, target: int) -> None:
    """Sums of each row over groups of 16 or 32 columns; `target` has a place for every 16."""
    for row in range(rows):
        at, out = x + 4 * columns * row, target + 4 * (columns // LANES) * row
        for number in range(columns // group):
            part = load(at + 4 * group * number)
            if group > LANES:
                part = add(part, load(at + 4 * group * number + FLOAT_BYTES))
            put(out + 4 * number, total(part))


@compiled(nogil=True)
def prepare(i: int, a: int, rows: int, scratch: int) -> None:
    """What the weights of instruction i need of the rows of x: sums, or all of it rounded."""
    columns = word(i + COLUMNS)
    for weight in (i + FIRST, i + SECOND):
        target = _prepared(i, weight, rows, scratch)
        if word(weight + SUMS) > 0:
            _group_sums(a, rows, columns, word(weight + SUMS), target)
        elif word(weight + SUMS) == ROUNDED and (weight == i + FIRST or _is_apart(i)):
            function = word(word(weight + FUNCTIONS) + 8 * ROUND)
            step = _prepared_bytes(weight, columns)
            for row in range(rows):
                call(function, (a + 4 * columns * row, columns, target + step * row))


@compiled(nogil=True)
def _is_apart(i: int) -> bool:
    """Whether the second weight needs something else of x than the first."""
    both: bool = word(i + FIRST + SUMS) == ROUNDED and word(i + SECOND + SUMS) == ROUNDED
    return not both


@compiled(nogil=True)
def _prepared(i: int, weight: int, rows: int, scratch: int) -> int:
    """Where it lies."""
    begin = scratch + _PREPARED
    if weight == i + SECOND and _is_apart(i):
        begin += _prepared_bytes(i + FIRST, word(i + COLUMNS)) * rows
    return begin


@compiled(nogil=True)
def product_tiles(i: int, first: int, last: int, a: int, rows: int, out: int, scratch: int) -> None:
    """Tiles `first:last` of the product that instruction i describes, for all rows.

    What they need of the rows is prepared.
    """
    columns = word(i + COLUMNS)
    gated = word(i + SECOND + WEIGHT) != 0
    own = _prepared(i, i + FIRST, rows, scratch)
    second = _prepared(i, i + SECOND, rows, scratch)
    most = min(_MOST_ROWS, max(1, _CACHED // (4 * columns * DOT_ROWS)) * DOT_ROWS)
    for start in range(0, rows, most):
        count = min(most, rows - start)
        x = a + 4 * columns * start
        skipped = _prepared_bytes(i + FIRST, columns) * start
        second_skipped = _prepared_bytes(i + SECOND, columns) * start
        together = max(1, _MOST_ROWS // count)  # memory is read fastest in order
        for tile in range(first, last, together):
            end = min(tile + together, last)
            _dots(columns, i + FIRST, tile, end, x, count, own + skipped, scratch)
            if gated:
                results = scratch + _RESULTS
                prepared = second + second_skipped
                _dots(columns, i + SECOND, tile, end, x, count, prepared, results)
            for done in range(tile, end):
                _finish(i, done, start, count, out, scratch + FLOAT_BYTES * count * (done - tile))


@compiled(nogil=True)
def _dots(
    columns: int, weight: int, first: int, last: int, a: int, rows: int, prepared: int, results: int
) -> None:
    """Products of rows with tiles, `[tiles, rows, 16]`."""
    stride, step = 4 * columns, _prepared_bytes(weight, columns)
    if word(weight + SUMS) == ROUNDED:
        a, stride = prepared, step
    out = results
    for tile in range(first, last):
        at = word(weight + WEIGHT) + word(weight + TILE_BYTES) * tile
        for row in range(0, rows, DOT_ROWS):
            count = min(DOT_ROWS, rows - row)
            function = word(word(weight + FUNCTIONS) + 8 * (count - 1))
            x, own = a + stride * row, prepared + step * row
            call(function, (at, columns, x, stride, own, step, out, FLOAT_BYTES))
            out += FLOAT_BYTES * count


@compiled(nogil=True)
def _finish(i: int, tile: int, start: int, rows: int, out: int, results: int) -> None:
    """Gate, bias and residual sum, then rows `start:start + rows` of the output."""
    width, bias, residual = word(i + WIDTH), word(i + B), word(i + C)
    gated = word(i + SECOND + WEIGHT) != 0
    column = LANES * tile
    for row in range(rows):
        at = results + FLOAT_BYTES * row
        target = 4 * (width * (start + row) + column)
        value = load(at)
        if gated:
            value = silu_times(value, load(at + _RESULTS))
        if column + LANES <= width:
            if bias != 0:
                value = add(value, load(bias + 4 * column))
            if residual != 0:
                value = add(value, load(residual + target))
            store(out + target, value)
            continue
        store(at, value)
        for lane in range(width - column):
            one = get(at + 4 * lane)
            if bias != 0:
                one += get(bias + 4 * (column + lane))
            if residual != 0:
                one += get(residual + target + 4 * lane)
            put(out + target + 4 * lane, one)
