"""Products with packed weights.

One row at a time reads the packed bytes once and multiplies as it unpacks: that is decoding, at the
speed of the memory. Several rows widen each tile to floats first, in memory that stays in the
cache, and use it for all rows: that is a prompt.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu.formats import BLOCK, F16, F32, Q4_0, Q4_1
from raygraft.kernels.cpu.vector import (
    LANES,
    add,
    fused,
    get,
    high_bits,
    load,
    load_half,
    load_packed,
    load_signed,
    low_bits,
    multiply,
    put,
    splat,
    store,
    total,
)

FEW_ROWS = 3
"""Up to so many rows are multiplied one by one."""
_VECTOR_BYTES = 4 * LANES
_HALVES = 2 * LANES
_NIBBLES = BLOCK // 2
_Q4_0_BYTES = _HALVES + LANES * _NIBBLES
_Q4_1_BYTES = 2 * _HALVES + LANES * _NIBBLES
_Q8_0_BYTES = _HALVES + LANES * BLOCK


@compiled(nogil=True)
def _dot_nibbles(numbers: int, x: int) -> Any:
    """16 rows of one block of 4-bit numbers, times 32 floats."""
    a = splat(np.float32(0))
    b, c, d = a, a, a
    for j in range(0, _NIBBLES, 2):
        even = load_packed(numbers + LANES * j)
        odd = load_packed(numbers + LANES * (j + 1))
        a = fused(low_bits(even), splat(get(x + 4 * j)), a)
        b = fused(high_bits(even), splat(get(x + 4 * (j + _NIBBLES))), b)
        c = fused(low_bits(odd), splat(get(x + 4 * (j + 1))), c)
        d = fused(high_bits(odd), splat(get(x + 4 * (j + 1 + _NIBBLES))), d)
    return add(add(a, b), add(c, d))


@compiled(nogil=True)
def _dot_bytes(numbers: int, x: int) -> Any:
    """16 rows of one block of signed bytes, times 32 floats."""
    a = splat(np.float32(0))
    b, c, d = a, a, a
    for j in range(0, BLOCK, 4):
        a = fused(load_signed(numbers + LANES * j), splat(get(x + 4 * j)), a)
        b = fused(load_signed(numbers + LANES * (j + 1)), splat(get(x + 4 * (j + 1))), b)
        c = fused(load_signed(numbers + LANES * (j + 2)), splat(get(x + 4 * (j + 2))), c)
        d = fused(load_signed(numbers + LANES * (j + 3)), splat(get(x + 4 * (j + 3))), d)
    return add(add(a, b), add(c, d))


@compiled(nogil=True)
def _dot_halves(tile: int, x: int, columns: int) -> Any:
    a = splat(np.float32(0))
    b = a
    for k in range(0, columns - 1, 2):
        a = fused(load_half(tile + _HALVES * k), splat(get(x + 4 * k)), a)
        b = fused(load_half(tile + _HALVES * (k + 1)), splat(get(x + 4 * (k + 1))), b)
    if columns % 2:
        k = columns - 1
        a = fused(load_half(tile + _HALVES * k), splat(get(x + 4 * k)), a)
    return add(a, b)


@compiled(nogil=True)
def _dot_floats(tile: int, x: int, columns: int) -> Any:
    a = splat(np.float32(0))
    b = a
    for k in range(0, columns - 1, 2):
        a = fused(load(tile + _VECTOR_BYTES * k), splat(get(x + 4 * k)), a)
        b = fused(load(tile + _VECTOR_BYTES * (k + 1)), splat(get(x + 4 * (k + 1))), b)
    if columns % 2:
        k = columns - 1
        a = fused(load(tile + _VECTOR_BYTES * k), splat(get(x + 4 * k)), a)
    return add(a, b)


@compiled(nogil=True)
def dot_tile(code: int, tile: int, x: int, sums: int, columns: int) -> Any:
    """16 rows of a weight times a row of floats. `sums` holds the sums of x over each block."""
    if code == F32:
        return _dot_floats(tile, x, columns)
    if code == F16:
        return _dot_halves(tile, x, columns)
    result = splat(np.float32(0))
    for block in range(columns // BLOCK):
        own = x + 4 * BLOCK * block
        own_sum = get(sums + 4 * block)
        if code == Q4_1:
            at = tile + _Q4_1_BYTES * block
            result = fused(load_half(at), _dot_nibbles(at + 2 * _HALVES, own), result)
            result = fused(load_half(at + _HALVES), splat(own_sum), result)
        elif code == Q4_0:
            at = tile + _Q4_0_BYTES * block
            numbers = add(_dot_nibbles(at + _HALVES, own), splat(np.float32(-8) * own_sum))
            result = fused(load_half(at), numbers, result)
        else:
            at = tile + _Q8_0_BYTES * block
            result = fused(load_half(at), _dot_bytes(at + _HALVES, own), result)
    return result


@compiled(nogil=True)
def widen_tile(code: int, tile: int, target: int, columns: int) -> None:
    """A tile as floats `[columns, 16]`."""
    if code == F32:
        for k in range(columns):
            store(target + _VECTOR_BYTES * k, load(tile + _VECTOR_BYTES * k))
        return
    if code == F16:
        for k in range(columns):
            store(target + _VECTOR_BYTES * k, load_half(tile + _HALVES * k))
        return
    for block in range(columns // BLOCK):
        own = target + _VECTOR_BYTES * BLOCK * block
        if code == Q4_1:
            at = tile + _Q4_1_BYTES * block
            _widen_nibbles(at + 2 * _HALVES, own, load_half(at), load_half(at + _HALVES))
        elif code == Q4_0:
            at = tile + _Q4_0_BYTES * block
            scale = load_half(at)
            offset = multiply(scale, splat(np.float32(-8)))
            _widen_nibbles(at + _HALVES, own, scale, offset)
        else:
            at = tile + _Q8_0_BYTES * block
            scale = load_half(at)
            for j in range(BLOCK):
                number = load_signed(at + _HALVES + LANES * j)
                store(own + _VECTOR_BYTES * j, multiply(scale, number))


@compiled(nogil=True)
def _widen_nibbles(numbers: int, target: int, scale: Any, offset: Any) -> None:
    for j in range(_NIBBLES):
        both = load_packed(numbers + LANES * j)
        store(target + _VECTOR_BYTES * j, fused(scale, low_bits(both), offset))
        high = target + _VECTOR_BYTES * (j + _NIBBLES)
        store(high, fused(scale, high_bits(both), offset))


@compiled(nogil=True)
def _store_rows(target: int, value: Any, count: int, spare: int) -> None:
    """Store a tile's result, or the first `count` lanes of it, by way of spare memory."""
    if count >= LANES:
        store(target, value)
    else:
        store(spare, value)
        for lane in range(count):
            put(target + 4 * lane, get(spare + 4 * lane))


@compiled(nogil=True)
def _eight_rows(tile: int, columns: int, x: int, stride: int, out: int, out_stride: int) -> None:
    """A widened tile times eight rows."""
    a = splat(np.float32(0))
    b, c, d, e, f, g, h = a, a, a, a, a, a, a
    for k in range(columns):
        weight = load(tile + _VECTOR_BYTES * k)
        at = x + 4 * k
        a = fused(weight, splat(get(at)), a)
        b = fused(weight, splat(get(at + stride)), b)
        c = fused(weight, splat(get(at + 2 * stride)), c)
        d = fused(weight, splat(get(at + 3 * stride)), d)
        e = fused(weight, splat(get(at + 4 * stride)), e)
        f = fused(weight, splat(get(at + 5 * stride)), f)
        g = fused(weight, splat(get(at + 6 * stride)), g)
        h = fused(weight, splat(get(at + 7 * stride)), h)
    store(out, a)
    store(out + out_stride, b)
    store(out + 2 * out_stride, c)
    store(out + 3 * out_stride, d)
    store(out + 4 * out_stride, e)
    store(out + 5 * out_stride, f)
    store(out + 6 * out_stride, g)
    store(out + 7 * out_stride, h)


@compiled(nogil=True)
def block_sums(x: int, columns: int, target: int) -> None:
    """Sums of a row over each block of 32 columns."""
    for block in range(columns // BLOCK):
        at = x + 4 * BLOCK * block
        put(target + 4 * block, total(add(load(at), load(at + _VECTOR_BYTES))))


@compiled(nogil=True)
def multiply_tiles(
    code: int,
    weight: int,
    tile_bytes: int,
    first: int,
    last: int,
    columns: int,
    width: int,
    x: int,
    rows: int,
    out: int,
    scratch: int,
) -> None:
    """Tiles `first:last` of `x @ weight.T`: x `[rows, columns]`, out `[rows, width]`.

    `scratch` has room for a widened tile, eight results, and the sums of `FEW_ROWS` rows.
    """
    stride, out_stride = 4 * columns, 4 * width
    results = scratch + _VECTOR_BYTES * columns
    sums = results + 8 * _VECTOR_BYTES
    blocks = 4 * (columns // BLOCK)
    if rows <= FEW_ROWS:
        for row in range(rows):
            block_sums(x + stride * row, columns, sums + blocks * row)
    for number in range(first, last):
        tile = weight + tile_bytes * number
        target = out + _VECTOR_BYTES * number
        count = min(LANES, width - LANES * number)
        if rows <= FEW_ROWS:
            for row in range(rows):
                value = dot_tile(code, tile, x + stride * row, sums + blocks * row, columns)
                _store_rows(target + out_stride * row, value, count, results)
            continue
        widen_tile(code, tile, scratch, columns)
        row = 0
        while row + 8 <= rows:
            own = x + stride * row
            if count == LANES:
                _eight_rows(scratch, columns, own, stride, target + out_stride * row, out_stride)
            else:
                _eight_rows(scratch, columns, own, stride, results, _VECTOR_BYTES)
                for r in range(8):
                    for lane in range(count):
                        value_at = results + _VECTOR_BYTES * r + 4 * lane
                        put(target + out_stride * (row + r) + 4 * lane, get(value_at))
            row += 8
        while row < rows:
            rest = _dot_floats(scratch, x + stride * row, columns)
            _store_rows(target + out_stride * row, rest, count, results)
            row += 1
