"""Raw memory in compiled code: addresses are int64, in bytes; nothing is checked."""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

_WORD = ir.IntType(64)

copy_bytes = types.ExternalFunction("memcpy", types.intp(types.int64, types.int64, types.int64))
"""Copy (target, source, bytes)."""


def reader(kind: Any, result: Any, doc: str, widen: str = "") -> Any:
    """An intrinsic that reads one number of an LLVM type at an address, and widens it."""

    def read(typing_context: Any, address: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            value = load_at(builder, arguments[0], kind)
            if not widen:
                return value
            return getattr(builder, widen)(value, context.get_value_type(result))

        return result(types.int64), generate

    read.__doc__ = doc
    return intrinsic(read)


def writer(kind: Any, value_type: Any, doc: str, narrow: str = "") -> Any:
    """An intrinsic that writes one number to an address, narrowed to an LLVM type."""

    def write(typing_context: Any, address: Any, value: Any) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            address, value = arguments
            store_at(builder, address, getattr(builder, narrow)(value, kind) if narrow else value)
            return context.get_dummy_value()

        return types.void(types.int64, value_type), generate

    write.__doc__ = doc
    return intrinsic(write)


def load_at(builder: ir.IRBuilder, address: Any, kind: Any) -> Any:
    """Generate a load that may be unaligned."""
    return builder.load(builder.inttoptr(address, kind.as_pointer()), align=1, typ=kind)


def store_at(builder: ir.IRBuilder, address: Any, value: Any) -> None:
    """Generate a store that may be unaligned."""
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=1)


word = reader(_WORD, types.int64, "One int64 at an address.")
put_word = writer(_WORD, types.int64, "Write one int64.")
get_integer = reader(ir.IntType(32), types.int64, "One int32 at an address.", "sext")
put_integer = writer(ir.IntType(32), types.int64, "Write one int32.", "trunc")


@intrinsic  # type: ignore[untyped-decorator]
def fetch_add(typing_context: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address as one indivisible step; what was there before."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.atomic_rmw("add", pointer, arguments[1], "acq_rel")

    return types.int64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def high_product(typing_context: Any, a: Any, b: Any) -> Any:
    """The upper 64 bits of the product of two words, as if they had no sign."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        wide = ir.IntType(128)
        product = builder.mul(*(builder.zext(argument, wide) for argument in arguments))
        return builder.trunc(builder.lshr(product, wide(64)), _WORD)

    return types.int64(types.int64, types.int64), generate


@intrinsic  # type: ignore[untyped-decorator]
def call(typing_context: Any, function: Any, arguments: Any) -> Any:
    """Call machine code at an address with a tuple of int64; it returns nothing."""
    count = len(arguments)

    def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        kind = ir.FunctionType(ir.VoidType(), [_WORD] * count)
        given = cgutils.unpack_tuple(builder, values[1], count)
        builder.call(builder.inttoptr(values[0], kind.as_pointer()), given)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, count)), generate
