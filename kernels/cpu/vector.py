"""Sixteen float lanes as one value of compiled code, and raw memory to load them from.

Numba vectorises scalar loops only by luck; here a vector is a type of its own, LLVM's `<16 x
float>`. LLVM maps it to what the processor has: one register with AVX-512, two with AVX2, four with
NEON. Addresses are plain integers in bytes; nothing is checked.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

LANES = 16

_F32 = ir.FloatType()
_VECTOR = ir.VectorType(_F32, LANES)
_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


class _VectorType(types.Type):  # type: ignore[misc]  # numba is untyped
    def __init__(self) -> None:
        super().__init__(name="float32x16")


class _BytesType(types.Type):  # type: ignore[misc]  # numba is untyped
    def __init__(self) -> None:
        super().__init__(name="uint8x16")


vector = _VectorType()
packed = _BytesType()


@register_model(_VectorType)
class _VectorModel(models.PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, _VECTOR)


@register_model(_BytesType)
class _BytesModel(models.PrimitiveModel):  # type: ignore[misc]  # numba is untyped
    def __init__(self, manager: Any, kind: Any) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(8), LANES))


def _lanes(kind: Any) -> Any:
    return ir.VectorType(kind, LANES)


def _constant(kind: Any, value: float) -> Any:
    return ir.Constant(_lanes(kind), [ir.Constant(kind, value)] * LANES)


def _load(builder: Any, address: Any, kind: Any) -> Any:
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1)


def _call(builder: Any, name: str, *arguments: Any) -> Any:
    shape = ir.FunctionType(_VECTOR, [argument.type for argument in arguments])
    function = cgutils.get_or_insert_function(builder.module, shape, name)
    return builder.call(function, arguments)


# The intrinsics are called by numba with (typing context, argument types); what they return makes
# code from (context, builder, signature, arguments). All of that is untyped.


@intrinsic  # type: ignore[untyped-decorator]
def load(typing_context: Any, address: Any) -> Any:
    """16 floats at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, arguments[0], _VECTOR)

    return vector(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def store(typing_context: Any, address: Any, value: Any) -> Any:
    """Write 16 floats to an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _VECTOR.as_pointer())
        builder.store(arguments[1], pointer, align=4)
        return context.get_dummy_value()

    return types.void(types.int64, vector), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_half(typing_context: Any, address: Any) -> Any:
    """16 half-precision floats at an address, widened."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        halves = _load(builder, arguments[0], _lanes(ir.HalfType()))
        return builder.fpext(halves, _VECTOR)

    return vector(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_signed(typing_context: Any, address: Any) -> Any:
    """16 signed bytes at an address, as floats."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        values = _load(builder, arguments[0], _lanes(ir.IntType(8)))
        return builder.sitofp(builder.sext(values, _lanes(_I32)), _VECTOR)

    return vector(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def load_packed(typing_context: Any, address: Any) -> Any:
    """16 bytes at an address, to be taken apart by `low_bits` and `high_bits`."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _load(builder, arguments[0], _lanes(ir.IntType(8)))

    return packed(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def low_bits(typing_context: Any, value: Any) -> Any:
    """The lower four bits of each byte, as floats."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.and_(arguments[0], _constant(ir.IntType(8), 15))
        return builder.uitofp(builder.zext(bits, _lanes(_I32)), _VECTOR)

    return vector(packed), generate


@intrinsic  # type: ignore[untyped-decorator]
def high_bits(typing_context: Any, value: Any) -> Any:
    """The upper four bits of each byte, as floats."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = builder.zext(arguments[0], _lanes(_I32))
        return builder.uitofp(builder.lshr(wide, _constant(_I32, 4)), _VECTOR)

    return vector(packed), generate


@intrinsic  # type: ignore[untyped-decorator]
def splat(typing_context: Any, value: Any) -> Any:
    """One float in all lanes."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        first = builder.insert_element(ir.Constant(_VECTOR, ir.Undefined), arguments[0], _I32(0))
        zeros = ir.Constant(_lanes(_I32), [_I32(0)] * LANES)
        return builder.shuffle_vector(first, ir.Constant(_VECTOR, ir.Undefined), zeros)

    return vector(types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def fused(typing_context: Any, a: Any, b: Any, c: Any) -> Any:
    """a * b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _call(builder, "llvm.fma.v16f32", *arguments)

    return vector(vector, vector, vector), generate


@intrinsic  # type: ignore[untyped-decorator]
def add(typing_context: Any, a: Any, b: Any) -> Any:
    """a + b."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fadd(*arguments)

    return vector(vector, vector), generate


@intrinsic  # type: ignore[untyped-decorator]
def multiply(typing_context: Any, a: Any, b: Any) -> Any:
    """a * b."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fmul(*arguments)

    return vector(vector, vector), generate


@intrinsic  # type: ignore[untyped-decorator]
def total(typing_context: Any, a: Any) -> Any:
    """The sum of all lanes, halves first."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (value,) = arguments
        width = LANES
        while width > 1:
            width //= 2
            half = ir.VectorType(_F32, width)
            undefined = ir.Constant(value.type, ir.Undefined)
            mask = ir.VectorType(_I32, width)
            low = ir.Constant(mask, [_I32(lane) for lane in range(width)])
            high = ir.Constant(mask, [_I32(lane + width) for lane in range(width)])
            parts = (builder.shuffle_vector(value, undefined, m) for m in (low, high))
            value = builder.fadd(*parts)
            assert value.type == half
        return builder.extract_element(value, _I32(0))

    return types.float32(vector), generate


@intrinsic  # type: ignore[untyped-decorator]
def get(typing_context: Any, address: Any) -> Any:
    """One float at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], _F32.as_pointer()))

    return types.float32(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def put(typing_context: Any, address: Any, value: Any) -> Any:
    """Write one float to an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        builder.store(arguments[1], builder.inttoptr(arguments[0], _F32.as_pointer()))
        return context.get_dummy_value()

    return types.void(types.int64, types.float32), generate


@intrinsic  # type: ignore[untyped-decorator]
def get_double(typing_context: Any, address: Any) -> Any:
    """One double-precision float at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], ir.DoubleType().as_pointer()))

    return types.float64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def word(typing_context: Any, address: Any) -> Any:
    """One int64 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.load(builder.inttoptr(arguments[0], _I64.as_pointer()))

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def get_integer(typing_context: Any, address: Any) -> Any:
    """One int32 at an address."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = builder.load(builder.inttoptr(arguments[0], _I32.as_pointer()))
        return builder.sext(value, _I64)

    return types.int64(types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typing_context: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address as one indivisible step; what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate
