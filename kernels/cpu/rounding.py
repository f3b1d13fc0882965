"""Rows of x as 16-bit integers, for products with weights that are integers as well.

For each 32 columns a record of 96 bytes: sixteen pairs of integers, of columns c and c + 8 as
`formats/base.py` orders them; then, in words of 32 bits, their scale (the largest magnitude is
32,767), and the integers' sums. A product of integers is exact, in whatever order it is added. What
rounding leaves is at most 1/65,534 of the largest number of the 32: some 2e-5 of a row.

A number that is not finite makes the scale of its record no number at all.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from raygraft.kernels.cpu.lanes import (
    FLOAT_BYTES,
    LANES,
    WORD,
    Address,
    Lanes,
    declared,
    function,
    repeat,
)

RECORD_BYTES = 96
RECORD_COLUMNS = 32
LARGEST = 32_767.0
SCALE, SUM, HALF_SUMS, NEGATIVE_HALF_SUMS, NEGATIVE_SUM = (64 + 4 * n for n in (0, 1, 2, 4, 6))
"""Where words of a record lie: sums as floats, of all columns and of 16; negative ones as integers,
of 16 and of all."""
_SMALLEST = 1e-30
"""Largest magnitudes below it are taken for 0."""
_MAGNITUDE, _INFINITY = 0x7FFFFFFF, 0x7F800000

_LOWER = (*range(8), *range(LANES, LANES + 8))
"""Lanes of two vectors that become lower halves of pairs."""
_FLOAT, _I32 = ir.FloatType(), ir.IntType(32)
_FLOATS, _INTEGERS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_I32, LANES)


def write_round(module: ir.Module, name: str) -> None:
    """Write the function `name(x, columns, out)`: a row of floats as records."""
    builder, (x, columns, out) = function(module, name, 3)

    def each_record(number: Any) -> None:
        own = Address(builder, x) + builder.mul(number, WORD(4 * RECORD_COLUMNS))
        target = Address(builder, out) + builder.mul(number, WORD(RECORD_BYTES))
        _write_record(builder, (own.floats(), (own + FLOAT_BYTES).floats()), target)

    repeat(builder, builder.udiv(columns, WORD(RECORD_COLUMNS)), each_record)
    builder.ret_void()


def _write_record(builder: ir.IRBuilder, halves: tuple[Lanes, Lanes], target: Address) -> None:
    def call(name: str, result: Any, *arguments: Any) -> Any:
        return builder.call(declared(builder, name, result, arguments), arguments)

    def store(place: int, value: Any) -> None:
        pointer = builder.inttoptr((target + place).value, value.type.as_pointer())
        builder.store(value, pointer, align=4)

    # As integers, magnitudes keep their order, and what is no number comes last.
    bits = [Lanes(builder, builder.bitcast(half.value, _INTEGERS)) & _MAGNITUDE for half in halves]
    larger = call("llvm.smax.v16i32", _INTEGERS, *(each.value for each in bits))
    most = call("llvm.vector.reduce.smax.v16i32", _I32, larger)
    largest = builder.bitcast(most, _FLOAT)
    some = builder.fcmp_ordered(">", largest, _FLOAT(_SMALLEST))
    inverse = builder.select(some, builder.fdiv(_FLOAT(LARGEST), largest), _FLOAT(0.0))
    undefined = ir.Constant(_FLOATS, ir.Undefined)
    first = builder.insert_element(undefined, inverse, _I32(0))
    zero = ir.Constant(_INTEGERS, [_I32(0)] * LANES)
    factor = builder.shuffle_vector(first, undefined, zero)
    all_lanes, current = ir.IntType(16)(-1), _I32(4)  # the rounding mode that is set: to nearest
    numbers = [
        call(
            "llvm.x86.avx512.mask.cvtps2dq.512", _INTEGERS,
            builder.fmul(half.value, factor), zero, all_lanes, current,
        )
        for half in halves
    ]  # fmt: skip
    lower, upper = (
        builder.shuffle_vector(*numbers, ir.Constant(_INTEGERS, [_I32(n + s) for n in _LOWER]))
        for s in (0, 8)
    )
    pairs = Lanes(builder, lower) & 0xFFFF | Lanes(builder, upper) << 16
    store(0, pairs.value)
    scale = builder.select(some, builder.fmul(largest, _FLOAT(1 / LARGEST)), _FLOAT(0.0))
    finite = builder.icmp_signed("<", most, _I32(_INFINITY))
    store(SCALE, builder.select(finite, scale, _FLOAT(float("nan"))))
    sums = [call("llvm.vector.reduce.add.v16i32", _I32, half) for half in numbers]
    total = builder.add(*sums)
    store(SUM, builder.sitofp(total, _FLOAT))
    store(NEGATIVE_SUM, builder.neg(total))
    for number, own in enumerate(sums):
        store(HALF_SUMS + 4 * number, builder.sitofp(own, _FLOAT))
        store(NEGATIVE_HALF_SUMS + 4 * number, builder.neg(own))
