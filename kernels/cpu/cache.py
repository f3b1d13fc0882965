"""The paged KV cache: how it lies in memory, how rows are written, how tiles are read.

A page holds keys in tiles of sixteen positions, `[tiles, key_size, 16]`, so that a product with a
tile gives the scores of sixteen positions at once, and values as `[block_size, value_size]`. An
8-bit cache has a float16 scale for each 32 numbers of a position, as the weight format Q8_0 has:
before each 32 rows of a tile of keys, before each 32 numbers of a row of values.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raygraft.graph.operators import KeyValueState
from raygraft.kernels.compiled import compiled
from raygraft.kernels.cpu.instructions import OUT, OWN, POSITIONS, SEQUENCE, TABLE_STRIDE, TABLES
from raygraft.kernels.cpu.lanes import FLOAT_BYTES, LANES
from raygraft.kernels.cpu.vector import (
    get,
    get_half,
    load_halves,
    load_signed,
    multiply,
    put,
    put_byte,
    put_half,
    splat,
    store,
)
from raygraft.kernels.raw import get_integer, word

CACHE_CODES = {"f32": 0, "f16": 1, "q8_0": 2}
F32, F16, Q8_0 = CACHE_CODES.values()
QUANTISED = 32
"""Numbers of a head that share a scale in an 8-bit cache."""


@dataclass(frozen=True)
class CacheLayout:
    """How one attention operator's cache lies in memory. Sizes are in bytes."""

    state: KeyValueState
    block_size: int
    type: str

    @property
    def key_tile(self) -> int:
        """The keys of sixteen positions of one head."""
        return LANES * _row_bytes(self.state.key_size, self.type)

    @property
    def keys_page(self) -> int:
        """One head's keys in a page."""
        return -(-self.block_size // LANES) * self.key_tile

    @property
    def value_row(self) -> int:
        """One position's values of one head."""
        return _row_bytes(self.state.value_size, self.type)

    @property
    def values_page(self) -> int:
        """One head's values in a page."""
        return self.block_size * self.value_row


def _row_bytes(size: int, kind: str) -> int:
    if kind == "q8_0":
        return size + 2 * (size // QUANTISED)
    return size * (4 if kind == "f32" else 2)


@compiled(nogil=True)
def padded(size: int) -> int:
    """A size in whole vectors."""
    return -(-size // LANES) * LANES


# Own numbers of instructions that work on a cache, then of the one that writes to it. A cell is
# what a page is made of: a tile of keys, or a row of values.
KV_HEADS, BLOCK_SIZE, CACHE_TYPE = (OWN + 8 * place for place in range(3))
SIZE, PAGE_BYTES, CELL_BYTES, IS_KEY = (OWN + 8 * place for place in range(3, 7))


@compiled(nogil=True)
def table_of(step: int, row: int) -> int:
    """Address of the block table of a row's sequence."""
    sequence = get_integer(word(step + SEQUENCE) + 4 * row)
    address: int = word(step + TABLES) + 4 * word(step + TABLE_STRIDE) * sequence
    return address


@compiled(nogil=True)
def page_of(i: int, step: int, row: int, position: int) -> int:
    """The page of a position in the sequence of a row."""
    page: int = get_integer(table_of(step, row) + 4 * (position // word(i + BLOCK_SIZE)))
    return page


@compiled(nogil=True)
def write_cache(i: int, step: int, x: int, first: int, last: int, by: int) -> None:
    """Rows of keys or values into their pages, of the items `first, first + by, ...`."""
    kv_heads, block_size = word(i + KV_HEADS), word(i + BLOCK_SIZE)
    cell = word(i + CELL_BYTES)
    for item in range(first, last, by):
        row, head = item // kv_heads, item % kv_heads
        position = get_integer(word(step + POSITIONS) + 4 * row)
        page = page_of(i, step, row, position)
        at = word(i + OUT) + (page * kv_heads + head) * word(i + PAGE_BYTES)
        place = position % block_size
        own, row_size = x + 4 * word(i + SIZE) * item, word(i + SIZE)
        if word(i + IS_KEY) != 0:
            tile = at + place // LANES * cell
            _write_key(word(i + CACHE_TYPE), own, row_size, tile, place % LANES)
        else:
            _write_value(word(i + CACHE_TYPE), own, row_size, at + place * cell)


@compiled(nogil=True)
def _write_key(kind: int, x: int, size: int, tile: int, lane: int) -> None:
    """A row as one lane of a tile. With 8 bits, scales stand before each 32 rows of the tile."""
    if kind == F32:
        for k in range(size):
            put(tile + FLOAT_BYTES * k + 4 * lane, get(x + 4 * k))
    elif kind == F16:
        for k in range(size):
            put_half(tile + 2 * (LANES * k + lane), get(x + 4 * k))
    else:
        for block in range(size // QUANTISED):
            at = tile + block * LANES * (QUANTISED + 2)
            factor = _scale_of(x + 4 * QUANTISED * block, at + 2 * lane)
            for k in range(QUANTISED):
                value = np.rint(get(x + 4 * (QUANTISED * block + k)) * factor)
                put_byte(at + 2 * LANES + LANES * k + lane, np.int64(value))


@compiled(nogil=True)
def _write_value(kind: int, x: int, size: int, at: int) -> None:
    """A row. With 8 bits, a scale stands before each 32 numbers."""
    if kind == F32:
        for k in range(size):
            put(at + 4 * k, get(x + 4 * k))
    elif kind == F16:
        for k in range(size):
            put_half(at + 2 * k, get(x + 4 * k))
    else:
        for block in range(size // QUANTISED):
            own = at + block * (QUANTISED + 2)
            factor = _scale_of(x + 4 * QUANTISED * block, own)
            for k in range(QUANTISED):
                value = np.rint(get(x + 4 * (QUANTISED * block + k)) * factor)
                put_byte(own + 2 + k, np.int64(value))


@compiled(nogil=True)
def _scale_of(x: int, target: int) -> np.float32:
    """Write the scale of 32 numbers, as in Q8_0; what to multiply them with."""
    most = np.float32(0)
    for k in range(QUANTISED):
        most = max(most, abs(get(x + 4 * k)))
    scale = most / np.float32(127)
    put_half(target, scale)
    return np.float32(1) / scale if scale > 0 else np.float32(0)


@compiled(nogil=True)
def keys_at(kind: int, tile: int, size: int, wide: int) -> int:
    """A tile of keys as floats `[size, 16]`: where it lies, or its copy."""
    if kind == F32:
        return tile
    if kind == F16:
        for k in range(size):
            store(wide + FLOAT_BYTES * k, load_halves(tile + 2 * LANES * k))
        return wide
    for block in range(size // QUANTISED):
        at = tile + block * LANES * (QUANTISED + 2)
        scale = load_halves(at)
        for k in range(QUANTISED):
            value = multiply(scale, load_signed(at + 2 * LANES + LANES * k))
            store(wide + FLOAT_BYTES * (QUANTISED * block + k), value)
    return wide


@compiled(nogil=True)
def values_at(kind: int, rows: int, count: int, size: int, row_bytes: int, wide: int) -> int:
    """Rows of values as floats: where they lie, or their copy, whose rows are whole vectors."""
    if kind == F32:
        return rows
    stride = 4 * padded(size)
    for row in range(count):
        at, target = rows + row_bytes * row, wide + stride * row
        if kind == F16:
            for k in range(0, size, LANES):
                store(target + 4 * k, load_halves(at + 2 * k))
            continue
        for block in range(size // QUANTISED):
            own = at + block * (QUANTISED + 2)
            scale = splat(get_half(own))
            for k in range(0, QUANTISED, LANES):
                value = multiply(scale, load_signed(own + 2 + k))
                store(target + 4 * (QUANTISED * block + k), value)
    return wide
