"""Generated inner loops of the products with packed weights, for each format.

`dot` reads a tile once and multiplies as it unpacks, for up to eight rows at a time: for one row at
the speed of the memory, for eight at that of the multipliers. A row's products do not depend on how
many rows are computed with it. Where weights are integers, x is rounded to integers of 16 bits (see
`rounding.py`): their products are summed exactly over a group, then scaled. Elsewhere numbers times
x are added one after the other for each run of sixteen columns, then, times the group's scale, to
the result; then the group's offset times the sum of x.

`multiply` knows no formats: attention uses it.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from raygraft.kernels.cpu.formats import PANEL, Format, Group
from raygraft.kernels.cpu.lanes import (
    FLOAT_BYTES,
    LANES,
    WORD,
    Address,
    Lanes,
    Sum,
    function,
    has_feature,
    repeat,
    zeros,
)
from raygraft.kernels.cpu.machine_code import compile_module
from raygraft.kernels.cpu.rounding import (
    HALF_SUMS,
    NEGATIVE_HALF_SUMS,
    NEGATIVE_SUM,
    RECORD_BYTES,
    RECORD_COLUMNS,
    SCALE,
    SUM,
    write_round,
)

DOT_ROWS = 8
"""Most rows of one call of `dot`."""
MULTIPLY_ROWS = 12 if has_feature("avx512f") else 6
"""Most rows of one call of `multiply`: what fits the registers."""
WIDEN = DOT_ROWS
"""Place of `widen` among a format's functions; `dot` of n rows has place n - 1."""
ROUND = WIDEN + 1
_RUN = 16
"""Columns whose products are added one after the other."""

_AHEAD = 8192
"""Bytes of weights that are asked for ahead of time."""
_LINE = 64
_SIDE_BY_SIDE = 2
"""Rows up to which neighbouring runs are computed together."""
_CHAINS = 4
"""Sums of pairs that are computed side by side: one alone would wait for itself."""


def format_functions(kind: Format) -> NDArray[np.int64]:
    """Addresses of a format's functions: `dot` of 1 to 8 rows, `widen`, for pairs `round`.

    - `dot(tile, columns, x, stride, sums, sums_stride, out, out_stride)`: 16 rows of the weight
      times rows of x; `sums` holds the sums of x over each group of columns, and out becomes
      rows of 16 floats. Strides are the bytes from one row to the next. With a format in pairs
      x is rows of records, which need no further sums.
    - `widen(tile, columns, out)`: a tile, or the rest of one, as floats `[columns, 16]`.
    - `round(x, columns, out)`: a row of x as records.
    """

    def write() -> ir.Module:
        module = ir.Module(kind.name)
        for rows in range(1, DOT_ROWS + 1):
            (_write_pair_dot if kind.in_pairs else _write_dot)(module, kind, rows)
        _write_widen(module, kind)
        if kind.in_pairs:
            write_round(module, "round")
        return module

    names = [*(f"dot{rows}" for rows in range(1, DOT_ROWS + 1)), "widen"]
    if kind.in_pairs:
        names.append("round")
    return compile_module(kind.name, write, names)


def _write_dot(module: ir.Module, kind: Format, rows: int) -> None:
    builder, arguments = function(module, f"dot{rows}", 8)
    tile, columns, x, stride, sums, sums_stride, out, out_stride = arguments
    results = [Sum.zero(builder) for _ in range(rows)]
    starts = _rows(Address(builder, x), stride, rows)
    sum_starts = _rows(Address(builder, sums), sums_stride, rows)

    def add_groups(groups: Sequence[Group]) -> None:
        first, count = groups[0].column, groups[0].count
        if _asks_ahead(kind, rows):
            _ask_ahead(kind, Address(builder, tile), first, len(groups) * count)
        at = builder.mul(first, WORD(4))
        for group, runs in zip(
            groups, _products(groups, [start + at for start in starts]), strict=True
        ):
            for run in runs:
                for product, result in zip(run, results, strict=True):
                    result.set(_scaled(group, product, result.lanes))
            if group.offset is not None:
                place = builder.mul(builder.udiv(group.column, WORD(count)), WORD(4))
                for start, result in zip(sum_starts, results, strict=True):
                    result.set(group.offset.times((start + place).splat(), result.lanes))

    kind.each_groups(builder, Address(builder, tile), columns, add_groups)
    for result, target in zip(results, _rows(Address(builder, out), out_stride, rows), strict=True):
        target.store(result.lanes)
    builder.ret_void()


def _write_pair_dot(module: ir.Module, kind: Format, rows: int) -> None:
    builder, arguments = function(module, f"dot{rows}", 8)
    tile, columns, x, stride, _, _, out, out_stride = arguments
    results = [Sum.zero(builder) for _ in range(rows)]
    starts = _rows(Address(builder, x), stride, rows)

    def add_groups(groups: Sequence[Group]) -> None:
        first = groups[0].column
        if _asks_ahead(kind, rows):
            _ask_ahead(kind, Address(builder, tile), first, RECORD_COLUMNS)
        at = builder.mul(first, WORD(RECORD_BYTES // RECORD_COLUMNS))
        records = [start + at for start in starts]
        added: list[Lanes | None] = [None] * rows
        for place, group in enumerate(groups):
            assert group.scale is not None
            whole = len(groups) == 1
            for row, total in enumerate(_pair_sums(group, place, whole, records)):
                own = total.floats()
                before = added[row]
                value = group.scale * own if before is None else group.scale.times(own, before)
                if group.offset is not None:
                    sums = records[row] + (SUM if whole else HALF_SUMS + 4 * place)
                    value = group.offset.times(sums.splat(), value)
                added[row] = value
        for record, sums_of_all, result in zip(records, added, results, strict=True):
            assert sums_of_all is not None
            result.set(sums_of_all.times((record + SCALE).splat(), result.lanes))

    kind.each_groups(builder, Address(builder, tile), columns, add_groups)
    for result, target in zip(results, _rows(Address(builder, out), out_stride, rows), strict=True):
        target.store(result.lanes)
    builder.ret_void()


def _pair_sums(group: Group, place: int, whole: bool, records: Sequence[Address]) -> list[Lanes]:
    """For each row of x, the sum of a group's products: a chunk is one group, or two."""
    assert group.pair is not None
    builder = records[0].builder
    chains = max(1, _CHAINS // len(records))
    sums: list[list[Lanes]] = []
    for record in records:
        begin = zeros(builder)
        if group.centre:
            negative = NEGATIVE_SUM if whole else NEGATIVE_HALF_SUMS + 4 * place
            begin = (record + negative).splat_word() << group.centre.bit_length() - 1
        sums.append([begin, *[zeros(builder)] * (chains - 1)])
    for number in range(group.count // 2):
        pair = group.pair(number)
        for record, own in zip(records, sums, strict=True):
            factors = (record + 4 * (place * group.count // 2 + number)).splat_word()
            own[number % chains] = pair.pair_products(factors, own[number % chains])
    return [functools.reduce(Lanes.plus, own) for own in sums]


def _asks_ahead(kind: Format, rows: int) -> bool:
    """Whether weights are asked for ahead of time.

    The instructions that a processor has in flight reach only a little further. With one row of
    wide weights they reach far enough, and asking would stand in the way.
    """
    return rows > 1 or kind.tile_bytes(PANEL) < LANES * PANEL


def _ask_ahead(kind: Format, tile: Address, first: Any, columns: int) -> None:
    """Have the bytes fetched that lie so far behind these columns; together they leave no gap."""
    builder, panel = tile.builder, kind.tile_bytes(PANEL)
    ahead = tile + builder.udiv(builder.mul(first, WORD(panel)), WORD(PANEL)) + _AHEAD
    for line in range(0, -(-columns * panel // PANEL), _LINE):
        (ahead + line).prefetch()


def _rows(first: Address, stride: Any, count: int) -> list[Address]:
    found = [first]
    for _ in range(count - 1):
        found.append(found[-1] + stride)
    return found


def _products(groups: Sequence[Group], rows: list[Address]) -> list[list[list[Lanes]]]:
    """For each group and each of its runs, the run's numbers times each row.

    Of few rows the runs are taken side by side: a sum alone would wait for itself.
    """
    size = groups[0].count
    columns = list(range(len(groups) * size))
    if len(rows) <= _SIDE_BY_SIDE:
        columns.sort(key=lambda column: column % _RUN)
    found: list[list[list[Lanes]]] = [[[] for _ in range(0, size, _RUN)] for _ in groups]
    for column in columns:
        which, place = divmod(column, size)
        number = groups[which].number(place)
        factors = [(row + 4 * column).splat() for row in rows]
        run = found[which][place // _RUN]
        if run:
            run[:] = [number.times(x, before) for x, before in zip(factors, run, strict=True)]
        else:
            run[:] = [number * x for x in factors]
    return found


def _scaled(group: Group, product: Lanes, result: Lanes) -> Lanes:
    return product + result if group.scale is None else group.scale.times(product, result)


def _write_widen(module: ir.Module, kind: Format) -> None:
    builder, (tile, columns, out) = function(module, "widen", 3)

    def store_groups(groups: Sequence[Group]) -> None:
        for group in groups:
            target = Address(builder, out) + builder.mul(group.column, WORD(FLOAT_BYTES))
            for j in range(group.count):
                value = group.number(j)
                if group.offset is not None and group.scale is not None:
                    value = group.scale.times(value, group.offset)
                elif group.scale is not None:
                    value = group.scale * value
                (target + FLOAT_BYTES * j).store(value)

    kind.each_groups(builder, Address(builder, tile), columns, store_groups)
    builder.ret_void()


def multiply_functions() -> NDArray[np.int64]:
    """Addresses of `multiply` for 1 to `MULTIPLY_ROWS` rows.

    `multiply(a, step, count, x, stride, out, out_stride, more)`: out is rows of 16 floats,
    `out_stride` bytes apart; each becomes the sum over k of x[row, k] times the 16 floats at
    `a + step * k`. With `more` it is added to.
    """
    names = [f"multiply{rows}" for rows in range(1, MULTIPLY_ROWS + 1)]

    def write() -> ir.Module:
        module = ir.Module("multiply")
        for number, name in enumerate(names):
            _write_multiply(module, name, number + 1)
        return module

    return compile_module("multiply", write, names)


def _write_multiply(module: ir.Module, name: str, rows: int) -> None:
    builder, arguments = function(module, name, 8)
    a, step, count, x, stride, out, out_stride, more = arguments
    sums = [Sum.zero(builder) for _ in range(rows)]
    starts = _rows(Address(builder, x), stride, rows)
    targets = _rows(Address(builder, out), out_stride, rows)
    with builder.if_then(builder.icmp_signed("!=", more, WORD(0))):
        for each, target in zip(sums, targets, strict=True):
            each.set(target.floats())

    def add_column(k: Any) -> None:
        number = (Address(builder, a) + builder.mul(k, step)).floats()
        for each, start in zip(sums, starts, strict=True):
            factor = (start + builder.mul(k, WORD(4))).splat()
            each.set(number.times(factor, each.lanes))

    repeat(builder, count, add_column)
    for each, target in zip(sums, targets, strict=True):
        target.store(each.lanes)
    builder.ret_void()
