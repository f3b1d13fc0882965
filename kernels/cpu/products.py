"""Generated inner loops of the products with packed weights, for each format.

`dot` reads a tile once and multiplies as it unpacks, for up to eight rows at a time: that is
decoding, at the speed of the memory. `widen` unpacks part of a tile to floats that stay in the
cache, and `multiply` uses them for up to twelve rows at a time: that is a prompt. `multiply` knows
no formats; attention uses it as well.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from raygraft.kernels.cpu.formats import PANEL, Format, Group
from raygraft.kernels.cpu.lanes import (
    FLOAT_BYTES,
    WORD,
    Address,
    Lanes,
    Sum,
    function,
    has_feature,
    repeat,
)
from raygraft.kernels.cpu.machine_code import compile_module

DOT_ROWS = 8
"""Most rows of one call of `dot`."""
FEW_ROWS = 2 * DOT_ROWS
"""Rows up to which two calls of `dot`, on a tile that stays in the cache, beat widening."""
WIDEN = DOT_ROWS
"""Place of `widen` among a format's functions; `dot` of n rows has place n - 1."""

_AHEAD = 4096
"""Bytes that are asked for ahead of time: the processor's own guess ends with a page."""
_LINE = 64

# What fits the registers: AVX-512 and NEON have 32, of 16 and 4 floats, AVX2 has 16 of 8.
MULTIPLY_ROWS, MULTIPLY_TILES = (12, 2) if has_feature("avx512f") else (6, 1)


@functools.cache
def format_functions(kind: Format) -> NDArray[np.int64]:
    """Addresses of a format's functions: `dot` of 1 to 8 rows, then `widen`.

    - `dot(tile, columns, x, stride, sums, sums_stride, out, out_stride)`: 16 rows of the weight
      times rows of x; `sums` holds the sums of x over each group of columns, and out becomes
      rows of 16 floats. Strides are the bytes from one row to the next.
    - `widen(tile, columns, out)`: a tile, or the rest of one, as floats `[columns, 16]`.
    """

    def write() -> ir.Module:
        module = ir.Module(kind.name)
        for rows in range(1, DOT_ROWS + 1):
            _write_dot(module, kind, rows)
        _write_widen(module, kind)
        return module

    names = [*(f"dot{rows}" for rows in range(1, DOT_ROWS + 1)), "widen"]
    return compile_module(kind.name, write, names)


def _write_dot(module: ir.Module, kind: Format, rows: int) -> None:
    builder, arguments = function(module, f"dot{rows}", 8)
    tile, columns, x, stride, sums, sums_stride, out, out_stride = arguments
    results = [Sum.zero(builder) for _ in range(rows)]
    starts = _rows(Address(builder, x), stride, rows)
    sum_starts = _rows(Address(builder, sums), sums_stride, rows)

    column_bytes = kind.tile_bytes(PANEL) // PANEL

    def add_group(group: Group) -> None:
        ahead = Address(builder, tile) + builder.mul(group.column, WORD(column_bytes))
        for line in range(0, group.count * column_bytes, _LINE):
            (ahead + _AHEAD + line).prefetch()
        at = builder.mul(group.column, WORD(4))
        products = _products(group, [start + at for start in starts])
        for row, result in enumerate(results):
            value = products[row]
            if group.scale is not None:
                value = group.scale.times(value, result.lanes)
            else:
                value = value + result.lanes
            if group.offset is not None:
                place = builder.mul(builder.udiv(group.column, WORD(group.count)), WORD(4))
                value = group.offset.times((sum_starts[row] + place).splat(), value)
            result.set(value)

    kind.each_group(builder, Address(builder, tile), columns, add_group)
    for result, target in zip(results, _rows(Address(builder, out), out_stride, rows), strict=True):
        target.store(result.lanes)
    builder.ret_void()


def _rows(first: Address, stride: Any, count: int) -> list[Address]:
    found = [first]
    for _ in range(count - 1):
        found.append(found[-1] + stride)
    return found


def _products(group: Group, rows: list[Address]) -> list[Lanes]:
    """The group's numbers times each row, in as many chains as keep the multipliers busy."""
    chains = max(1, min(4 // len(rows), group.count // 8))
    partial: list[list[Lanes]] = [[] for _ in rows]
    for j in range(group.count):
        number = group.number(j)
        for row, parts in zip(rows, partial, strict=True):
            factor = (row + 4 * j).splat()
            if len(parts) < chains:
                parts.append(number * factor)
            else:
                parts[j % chains] = number.times(factor, parts[j % chains])
    return [functools.reduce(Lanes.__add__, parts) for parts in partial]


def _write_widen(module: ir.Module, kind: Format) -> None:
    builder, (tile, columns, out) = function(module, "widen", 3)

    def store_group(group: Group) -> None:
        target = Address(builder, out) + builder.mul(group.column, WORD(FLOAT_BYTES))
        for j in range(group.count):
            value = group.number(j)
            if group.offset is not None and group.scale is not None:
                value = group.scale.times(value, group.offset)
            elif group.scale is not None:
                value = group.scale * value
            (target + FLOAT_BYTES * j).store(value)

    kind.each_group(builder, Address(builder, tile), columns, store_group)
    builder.ret_void()


@functools.cache
def multiply_functions() -> NDArray[np.int64]:
    """Addresses of `multiply` for 1 to `MULTIPLY_ROWS` rows with one tile, then with two.

    `multiply(a, step, second, count, x, stride, out, out_stride, more)`: out is rows of 16 or 32
    floats, `out_stride` bytes apart; each becomes the sum over k of x[row, k] times the 16 floats
    at `a + step * k`, and those `second` bytes further. With `more` it is added to.
    """
    sizes = [
        (tiles, rows)
        for tiles in range(1, MULTIPLY_TILES + 1)
        for rows in range(1, MULTIPLY_ROWS + 1)
    ]
    names = [f"multiply{tiles}x{rows}" for tiles, rows in sizes]

    def write() -> ir.Module:
        module = ir.Module("multiply")
        for name, (tiles, rows) in zip(names, sizes, strict=True):
            _write_multiply(module, name, tiles, rows)
        return module

    return compile_module("multiply", write, names)


def _write_multiply(module: ir.Module, name: str, tiles: int, rows: int) -> None:
    builder, arguments = function(module, name, 9)
    a, step, second, count, x, stride, out, out_stride, more = arguments
    sums = [[Sum.zero(builder) for _ in range(tiles)] for _ in range(rows)]
    starts = _rows(Address(builder, x), stride, rows)
    targets = _rows(Address(builder, out), out_stride, rows)
    with builder.if_then(builder.icmp_signed("!=", more, WORD(0))):
        for own, target in zip(sums, targets, strict=True):
            for tile, each in enumerate(own):
                each.set((target + FLOAT_BYTES * tile).floats())

    def add_column(k: Any) -> None:
        first = Address(builder, a) + builder.mul(k, step)
        weights = [tile.floats() for tile in _rows(first, second, tiles)]
        for own, start in zip(sums, starts, strict=True):
            factor = (start + builder.mul(k, WORD(4))).splat()
            for weight, each in zip(weights, own, strict=True):
                each.set(weight.times(factor, each.lanes))

    repeat(builder, count, add_column)
    for own, target in zip(sums, targets, strict=True):
        for tile, each in enumerate(own):
            (target + FLOAT_BYTES * tile).store(each.lanes)
    builder.ret_void()
