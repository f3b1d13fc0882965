"""Sixteen float lanes as one value of Numba code, and single floats in raw memory.

Numba vectorises scalar loops only by luck; here a vector is a type of its own, LLVM's `<16 x
float>` (see `lanes.py`). Addresses are plain integers in bytes; nothing is checked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, models, register_model

from raygraft.kernels.cpu.lanes import LANES, constant, declared
from raygraft.kernels.raw import load_at, reader, store_at, writer

_F32 = ir.FloatType()
_F64 = ir.DoubleType()
_VECTOR = ir.VectorType(_F32, LANES)
_I8, _I32 = ir.IntType(8), ir.IntType(32)
_INTEGERS = ir.VectorType(_I32, LANES)


class _VectorType(types.Type):  # type: ignore[misc]  # numba is untyped
    def __init__(self) -> None:
        super().__init__(name="float32x16")


vector = _VectorType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


# Intrinsics are called by numba with (typing context, argument types); what they return makes code
# from (context, builder, signature, arguments). All of that is untyped.


def _lane_wise(name: str, arguments: int, generate: Callable[..., Any], doc: str) -> Any:
    """An intrinsic from vectors to a vector; `generate` takes the builder and their values."""
    signature = vector(*[vector] * arguments)

    def make(typing_context: Any, *_: Any) -> Any:
        return signature, lambda context, builder, own, values: generate(builder, *values)

    shapes: dict[int, Any] = {
        1: lambda typing_context, a: make(typing_context),
        2: lambda typing_context, a, b: make(typing_context),
        3: lambda typing_context, a, b, c: make(typing_context),
    }
    function = shapes[arguments]
    function.__name__ = function.__qualname__ = name
    function.__doc__ = doc
    return intrinsic(function)


def _fused(builder: Any, a: Any, b: Any, c: Any) -> Any:
    return builder.call(declared(builder, "llvm.fma.v16f32", _VECTOR, (a, b, c)), (a, b, c))


def _exponential(builder: Any, x: Any) -> Any:
    """2 ** n * e ** r with n whole and r small: Cephes' expf, right to 2e-7.

    Below -87 it stays e ** -87 (1.6e-38), above 88 e ** 88; NaN stays NaN.
    """

    def clamp(value: Any, limit: float, comparison: str) -> Any:
        bound = constant(limit)
        return builder.select(builder.fcmp_ordered(comparison, value, bound), bound, value)

    x = clamp(clamp(x, -87.0, "<"), 88.0, ">")
    shifted = _fused(builder, x, constant(1.44269504088896341), constant(0.5))
    whole = builder.call(declared(builder, "llvm.floor.v16f32", _VECTOR, (shifted,)), (shifted,))
    rest = _fused(builder, whole, constant(-0.693359375), x)
    rest = _fused(builder, whole, constant(2.12194440e-4), rest)
    power = constant(1.9875691500e-4)
    for factor in (
        1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1,
    ):  # fmt: skip
        power = _fused(builder, power, rest, constant(factor))
    squared = builder.fmul(rest, rest)
    power = builder.fadd(_fused(builder, power, squared, rest), constant(1.0))
    bias = ir.Constant(_INTEGERS, [_I32(127)] * LANES)
    exponent = builder.add(builder.fptosi(whole, _INTEGERS), bias)
    exponent = builder.shl(exponent, ir.Constant(_INTEGERS, [_I32(23)] * LANES))
    return builder.fmul(power, builder.bitcast(exponent, _VECTOR))


def _swap(builder: Any, x: Any) -> Any:
    order = ir.Constant(_INTEGERS, [_I32(lane ^ 1) for lane in range(LANES)])
    return builder.shuffle_vector(x, ir.Constant(_VECTOR, ir.Undefined), order)


def _larger(builder: Any, a: Any, b: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _where_at_least(builder: Any, x: Any, limit: Any, value: Any) -> Any:
    return builder.select(builder.fcmp_ordered(">=", x, limit), value, constant(0.0))


add = _lane_wise("add", 2, lambda builder, a, b: builder.fadd(a, b), "a + b.")
multiply = _lane_wise("multiply", 2, lambda builder, a, b: builder.fmul(a, b), "a * b.")
divide = _lane_wise("divide", 2, lambda builder, a, b: builder.fdiv(a, b), "a / b.")
fused = _lane_wise("fused", 3, _fused, "a * b + c, rounded once.")
larger = _lane_wise("larger", 2, _larger, "The larger of each two.")
exponential = _lane_wise("exponential", 1, _exponential, "e to the power of each lane.")
where_at_least = _lane_wise(
    "where_at_least", 3, _where_at_least, "Values where x reaches a limit, else 0."
)
swap_pairs = _lane_wise("swap_pairs", 1, _swap, "Each lane for its neighbour.")


@intrinsic  # type: ignore[untyped-decorator]
def load(typing_context: Any, address: Any) -> Any:
    """16 floats at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return load_at(builder, arguments[0], _VECTOR)

    return vector(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(typing_context: Any, address: Any, value: Any) -> Any:
    """Write 16 floats to an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        store_at(builder, *arguments)
        return context.get_dummy_value()

    return types.void(types.int64, vector), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_halves(typing_context: Any, address: Any) -> Any:
    """16 float16 at an address, widened."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        halves = load_at(builder, arguments[0], ir.VectorType(ir.HalfType(), LANES))
        return builder.fpext(halves, _VECTOR)

    return vector(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_signed(typing_context: Any, address: Any) -> Any:
    """16 signed bytes at an address, as floats."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = load_at(builder, arguments[0], ir.VectorType(_I8, LANES))
        return builder.sitofp(builder.sext(values, _INTEGERS), _VECTOR)

    return vector(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def splat(typing_context: Any, value: Any) -> Any:
    """One float in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        undefined = ir.Constant(_VECTOR, ir.Undefined)
        first = builder.insert_element(undefined, arguments[0], _I32(0))
        zeros = ir.Constant(_INTEGERS, [_I32(0)] * LANES)
        return builder.shuffle_vector(first, undefined, zeros)

    return vector(types.float32), generate


def _reduced(builder: Any, value: Any, combine: Callable[..., Any]) -> Any:
    """All lanes combined to one, halves first."""
    width = LANES
    while width > 1:
        width //= 2
        undefined = ir.Constant(value.type, ir.Undefined)
        mask = ir.VectorType(_I32, width)
        low = ir.Constant(mask, [_I32(lane) for lane in range(width)])
        high = ir.Constant(mask, [_I32(lane + width) for lane in range(width)])
        value = combine(
            builder, *(builder.shuffle_vector(value, undefined, m) for m in (low, high))
        )
    return builder.extract_element(value, _I32(0))


@intrinsic  # type: ignore[untyped-decorator]
def total(typing_context: Any, a: Any) -> Any:
    """The sum of all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _reduced(builder, arguments[0], lambda builder, a, b: builder.fadd(a, b))

    return types.float32(vector), generate


@intrinsic  # type: ignore[untyped-decorator]
def largest(typing_context: Any, a: Any) -> Any:
    """The largest of all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _reduced(builder, arguments[0], _larger)

    return types.float32(vector), generate


@intrinsic  # type: ignore[untyped-decorator]
def bits_of(typing_context: Any, value: Any) -> Any:
    """The bits of a float, as a signed integer."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.sext(builder.bitcast(arguments[0], _I32), ir.IntType(64))

    return types.int64(types.float32), generate


get = reader(_F32, types.float32, "One float at an address.")
get_double = reader(_F64, types.float64, "One double-precision float at an address.")
get_half = reader(ir.HalfType(), types.float32, "One float16 at an address.", "fpext")
put = writer(_F32, types.float32, "Write one float.")
put_double = writer(_F64, types.float64, "Write one double-precision float.")
put_half = writer(ir.HalfType(), types.float32, "Write one float as float16.", "fptrunc")
put_byte = writer(_I8, types.int64, "Write the lowest byte of an integer.", "trunc")
