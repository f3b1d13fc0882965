"""Products with packed weights, and what is fused to them: bias, residual sum, gate.

Up to sixteen rows read the packed bytes and multiply as they unpack: that is decoding. More rows
widen part of a tile to floats, in memory that stays in the cache, and use it for all rows: that is
a prompt. Either way the products of one or two tiles land in scratch memory, and leave it finished.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu.formats import PANEL
from raygraft.kernels.cpu.instructions import (
    COLUMNS,
    FIRST,
    FUNCTIONS,
    MULTIPLY,
    PANEL_BYTES,
    SECOND,
    SUMS,
    TILE_BYTES,
    WEIGHT,
    WIDTH,
    B,
    C,
)
from raygraft.kernels.cpu.lanes import FLOAT_BYTES, LANES
from raygraft.kernels.cpu.products import DOT_ROWS, FEW_ROWS, MULTIPLY_ROWS, MULTIPLY_TILES, WIDEN
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

UNIT = MULTIPLY_TILES
"""Tiles that are computed together."""
_STRIDE = UNIT * FLOAT_BYTES  # of a row of results
_ROWS = 20 * MULTIPLY_ROWS  # results of so many rows stay in the cache
_WIDE = UNIT * PANEL * FLOAT_BYTES
_RESULTS = _ROWS * _STRIDE

# Where things lie in a thread's scratch memory.
_FIRST_RESULTS = _WIDE
_SECOND_RESULTS = _FIRST_RESULTS + _RESULTS
_SUMS = _SECOND_RESULTS + _RESULTS


def scratch_bytes(columns: int) -> int:
    """What a thread needs: widened tiles, two sets of results, two sets of sums of few rows."""
    return _SUMS + 2 * FEW_ROWS * 4 * (columns // LANES)


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
def prepare_sums(i: int, a: int, rows: int, scratch: int) -> None:
    """The sums of few rows that the weights of instruction i need."""
    columns = word(i + COLUMNS)
    if rows <= FEW_ROWS:
        for weight, sums in ((i + FIRST, _SUMS), (i + SECOND, _second_sums(columns))):
            if word(weight + SUMS) > 0:
                _group_sums(a, rows, columns, word(weight + SUMS), scratch + sums)


@compiled(nogil=True)
def _second_sums(columns: int) -> int:
    return _SUMS + FEW_ROWS * 4 * (columns // LANES)


@compiled(nogil=True)
def product_tiles(i: int, first: int, last: int, a: int, rows: int, out: int, scratch: int) -> None:
    """Tiles `first:last` of the product that instruction i describes, for all rows.

    The sums of few rows are prepared.
    """
    columns = word(i + COLUMNS)
    gated = word(i + SECOND + WEIGHT) != 0
    more_sums = _second_sums(columns)
    for tile in range(first, last, UNIT):
        tiles = min(UNIT, last - tile)
        if rows <= FEW_ROWS:
            _few_rows(i, i + FIRST, tile, tiles, a, rows, scratch + _FIRST_RESULTS, scratch + _SUMS)
            if gated:
                results, sums = scratch + _SECOND_RESULTS, scratch + more_sums
                _few_rows(i, i + SECOND, tile, tiles, a, rows, results, sums)
            _finish(i, tile, tiles, 0, rows, out, scratch)
            continue
        for row in range(0, rows, _ROWS):
            count = min(_ROWS, rows - row)
            own = a + 4 * columns * row
            _many_rows(i, i + FIRST, tile, tiles, own, count, scratch + _FIRST_RESULTS, scratch)
            if gated:
                results = scratch + _SECOND_RESULTS
                _many_rows(i, i + SECOND, tile, tiles, own, count, results, scratch)
            _finish(i, tile, tiles, row, count, out, scratch)


@compiled(nogil=True)
def _few_rows(
    i: int, weight: int, first: int, tiles: int, a: int, rows: int, results: int, sums: int
) -> None:
    """Products with whole tiles. The results of a row lie `_STRIDE` bytes after the row before."""
    columns = word(i + COLUMNS)
    stride, sums_stride = 4 * columns, 4 * (columns // LANES)
    for number in range(tiles):
        tile = word(weight + WEIGHT) + word(weight + TILE_BYTES) * (first + number)
        for row in range(0, rows, DOT_ROWS):
            function = word(word(weight + FUNCTIONS) + 8 * (min(DOT_ROWS, rows - row) - 1))
            x, own = a + stride * row, sums + sums_stride * row
            out = results + _STRIDE * row + FLOAT_BYTES * number
            call(function, (tile, columns, x, stride, own, sums_stride, out, _STRIDE))


@compiled(nogil=True)
def _many_rows(
    i: int, weight: int, first: int, tiles: int, a: int, rows: int, results: int, wide: int
) -> None:
    """The same by way of widened panels."""
    columns = word(i + COLUMNS)
    widen = word(word(weight + FUNCTIONS) + 8 * WIDEN)
    functions = word(i + MULTIPLY) + 8 * (tiles - 1) * MULTIPLY_ROWS
    step, second = FLOAT_BYTES, PANEL * FLOAT_BYTES
    for panel in range(-(-columns // PANEL)):
        count = min(PANEL, columns - PANEL * panel)
        for number in range(tiles):
            tile = word(weight + WEIGHT) + word(weight + TILE_BYTES) * (first + number)
            at = tile + word(weight + PANEL_BYTES) * panel
            call(widen, (at, count, wide + second * number))
        own = a + 4 * PANEL * panel
        for row in range(0, rows, MULTIPLY_ROWS):
            multiply_some = word(functions + 8 * (min(MULTIPLY_ROWS, rows - row) - 1))
            x, out = own + 4 * columns * row, results + _STRIDE * row
            more = 1 if panel > 0 else 0
            call(multiply_some, (wide, step, second, count, x, 4 * columns, out, _STRIDE, more))


@compiled(nogil=True)
def _finish(i: int, first: int, tiles: int, start: int, rows: int, out: int, scratch: int) -> None:
    """Gate, bias and residual sum, then rows `start:start + rows` of the output."""
    width, bias, residual = word(i + WIDTH), word(i + B), word(i + C)
    gated = word(i + SECOND + WEIGHT) != 0
    for row in range(rows):
        for number in range(tiles):
            column = LANES * (first + number)
            at = scratch + _FIRST_RESULTS + _STRIDE * row + FLOAT_BYTES * number
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
