"""Writing machine code of sixteen float lanes: the values and addresses of generated functions.

Inner loops are written as LLVM code from Python, because Numba vectorises scalar loops only by
luck. `Lanes` is LLVM's `<16 x float>` or `<16 x i32>`, which LLVM maps to what the processor has:
one register with AVX-512, two with AVX2, four with NEON.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import llvmlite.binding as llvm
from llvmlite import ir
from numba.core import config

LANES = 16
FLOAT_BYTES = 4 * LANES
"""Bytes of sixteen floats."""
LARGEST_TABLE = 32
"""Entries that `Lanes.look_up` can choose from: what two registers hold."""

_FLOAT = ir.FloatType()
_FLOATS = ir.VectorType(_FLOAT, LANES)
_I8, _I16, _I32, WORD = (ir.IntType(bits) for bits in (8, 16, 32, 64))
_INTEGERS = ir.VectorType(_I32, LANES)
_SHORTS = ir.VectorType(_I16, 2 * LANES)


def has_feature(name: str) -> bool:
    """Whether code is made for processors with a feature, by LLVM's name for it."""
    if config.CPU_FEATURES is not None:
        return f"+{name}" in config.CPU_FEATURES.split(",")
    return config.CPU_NAME is None and bool(llvm.get_host_cpu_features().get(name, False))


def multiplies_pairs() -> bool:
    """Whether code is made for processors that multiply 32 pairs of 16-bit integers at once."""
    return has_feature("avx512bw")


def constant(value: float) -> Any:
    """The same float in all lanes."""
    return ir.Constant(_FLOATS, [ir.Constant(_FLOAT, value)] * LANES)


def _integers(value: int) -> Any:
    return ir.Constant(_INTEGERS, [_I32(value)] * LANES)


def declared(builder: ir.IRBuilder, name: str, result: Any, arguments: Sequence[Any]) -> Any:
    """One of LLVM's own functions."""
    known = builder.module.globals.get(name)
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return known or ir.Function(builder.module, kind, name)


def zeros(builder: ir.IRBuilder) -> Lanes:
    """Integers that are 0."""
    return Lanes(builder, _integers(0))


@dataclass(frozen=True)
class Lanes:
    """Sixteen floats or sixteen 32-bit integers of generated code."""

    builder: ir.IRBuilder
    value: Any

    def _with(self, value: Any) -> Lanes:
        return Lanes(self.builder, value)

    def _call(self, name: str, *arguments: Any) -> Lanes:
        function = declared(self.builder, name, _FLOATS, arguments)
        return self._with(self.builder.call(function, arguments))

    def __add__(self, other: Lanes) -> Lanes:
        return self._with(self.builder.fadd(self.value, other.value))

    def __sub__(self, number: float) -> Lanes:
        return self._with(self.builder.fsub(self.value, constant(number)))

    def __mul__(self, other: Lanes | float) -> Lanes:
        factor = other.value if isinstance(other, Lanes) else constant(other)
        return self._with(self.builder.fmul(self.value, factor))

    def __neg__(self) -> Lanes:
        return self._with(self.builder.fneg(self.value))

    def times(self, factor: Lanes, addend: Lanes) -> Lanes:
        """self * factor + addend, rounded once."""
        return self._call("llvm.fma.v16f32", self.value, factor.value, addend.value)

    def __rshift__(self, bits: int) -> Lanes:
        return self._with(self.builder.lshr(self.value, _integers(bits))) if bits else self

    def __lshift__(self, bits: int) -> Lanes:
        return self._with(self.builder.shl(self.value, _integers(bits))) if bits else self

    def __and__(self, mask: int) -> Lanes:
        return self._with(self.builder.and_(self.value, _integers(mask)))

    def __or__(self, other: Lanes) -> Lanes:
        return self._with(self.builder.or_(self.value, other.value))

    def plus(self, other: Lanes) -> Lanes:
        """Sums of integers."""
        return self._with(self.builder.add(self.value, other.value))

    def pair_products(self, factors: Lanes, addend: Lanes) -> Lanes:
        """The lower halves' product and the upper halves' product are added to each lane.

        Halves are signed 16-bit integers.
        """
        if has_feature("avx512vnni"):
            values = (addend.value, self.value, factors.value)
            name = "llvm.x86.avx512.vpdpwssd.512"
            return self._with(
                self.builder.call(declared(self.builder, name, _INTEGERS, values), values)
            )
        values = tuple(self.builder.bitcast(each.value, _SHORTS) for each in (self, factors))
        name = "llvm.x86.avx512.pmaddw.d.512"
        both = self.builder.call(declared(self.builder, name, _INTEGERS, values), values)
        return self._with(self.builder.add(both, addend.value))

    def floats(self) -> Lanes:
        """Signed integers as floats."""
        return self._with(self.builder.sitofp(self.value, _FLOATS))

    def as_floats(self) -> Lanes:
        """The same bits, read as floats."""
        return self._with(self.builder.bitcast(self.value, _FLOATS))

    def look_up(self, table: Sequence[float]) -> Lanes:
        """The entry of a table that the lowest bits name; other bits do not count.

        A table has a power of two as its size, `LARGEST_TABLE` at most.
        """
        if has_feature("avx512f"):
            repeated = list(table) * max(1, LANES // len(table))
            first, *second = (
                ir.Constant(_FLOATS, [ir.Constant(_FLOAT, entry) for entry in repeated[n:][:LANES]])
                for n in range(0, len(repeated), LANES)
            )
            if second:
                return self._call("llvm.x86.avx512.vpermi2var.ps.512", first, self.value, *second)
            return self._call("llvm.x86.avx512.permvar.sf.512", first, self.value)
        places = self & (len(table) - 1)
        if list(table) == [table[0] + n for n in range(len(table))]:
            return places.floats() - -table[0]
        entries = ir.Constant(
            ir.VectorType(_FLOAT, len(table)), [ir.Constant(_FLOAT, entry) for entry in table]
        )
        found: Any = ir.Constant(_FLOATS, ir.Undefined)
        for lane in range(LANES):
            place = self.builder.extract_element(places.value, _I32(lane))
            entry = self.builder.extract_element(entries, place)
            found = self.builder.insert_element(found, entry, _I32(lane))
        return self._with(found)


@dataclass(frozen=True)
class Address:
    """A place in memory of generated code, in bytes. Nothing is checked or aligned."""

    builder: ir.IRBuilder
    value: Any

    def __add__(self, offset: Any) -> Address:
        """So many bytes further; the offset is a number or a 64-bit value of generated code."""
        if isinstance(offset, int):
            if offset == 0:
                return self
            offset = WORD(offset)
        return Address(self.builder, self.builder.add(self.value, offset))

    def _load(self, kind: Any) -> Any:
        pointer = self.builder.inttoptr(self.value, kind.as_pointer())
        return self.builder.load(pointer, align=1, typ=kind)

    def floats(self) -> Lanes:
        """16 floats."""
        return Lanes(self.builder, self._load(_FLOATS))

    def halves(self) -> Lanes:
        """16 half-precision floats, widened."""
        halves = self._load(ir.VectorType(ir.HalfType(), LANES))
        return Lanes(self.builder, self.builder.fpext(halves, _FLOATS))

    def bfloats(self) -> Lanes:
        """16 bfloat16, widened."""
        return (Lanes(self.builder, self._bits(_I16)) << 16).as_floats()

    def _bits(self, kind: Any) -> Any:
        return self.builder.zext(self._load(ir.VectorType(kind, LANES)), _INTEGERS)

    def unsigned(self) -> Lanes:
        """16 unsigned bytes, as integers."""
        return Lanes(self.builder, self._bits(_I8))

    def signed(self) -> Lanes:
        """16 signed bytes, as integers."""
        values = self._load(ir.VectorType(_I8, LANES))
        return Lanes(self.builder, self.builder.sext(values, _INTEGERS))

    def words(self) -> Lanes:
        """16 words of 32 bits."""
        return Lanes(self.builder, self._load(_INTEGERS))

    def prefetch(self) -> None:
        """Bring the line of memory into the cache; an address outside of memory does no harm."""
        place = self.builder.inttoptr(self.value, _I8.as_pointer())
        arguments = (place, _I32(0), _I32(3), _I32(1))  # to read, soon, data
        function = declared(self.builder, "llvm.prefetch.p0", ir.VoidType(), arguments)
        self.builder.call(function, arguments)

    def splat(self) -> Lanes:
        """One float, in all lanes."""
        return self._splat(_FLOAT, _FLOATS)

    def splat_word(self) -> Lanes:
        """One integer of 32 bits, in all lanes."""
        return self._splat(_I32, _INTEGERS)

    def _splat(self, kind: Any, lanes: Any) -> Lanes:
        undefined = ir.Constant(lanes, ir.Undefined)
        first = self.builder.insert_element(undefined, self._load(kind), _I32(0))
        return Lanes(self.builder, self.builder.shuffle_vector(first, undefined, _integers(0)))

    def store(self, lanes: Lanes) -> None:
        """Write 16 floats."""
        pointer = self.builder.inttoptr(self.value, _FLOATS.as_pointer())
        self.builder.store(lanes.value, pointer, align=4)


@dataclass(frozen=True)
class Sum:
    """Sixteen floats that a loop adds to; LLVM keeps them in registers."""

    builder: ir.IRBuilder
    place: Any

    @classmethod
    def zero(cls, builder: ir.IRBuilder) -> Sum:
        place = builder.alloca(_FLOATS)
        builder.store(constant(0.0), place)
        return cls(builder, place)

    @property
    def lanes(self) -> Lanes:
        return Lanes(self.builder, self.builder.load(self.place, typ=_FLOATS))

    def set(self, value: Lanes) -> None:
        self.builder.store(value.value, self.place)


def repeat(builder: ir.IRBuilder, count: Any, body: Callable[[Any], None]) -> None:
    """Generate `for number in range(count)`; both are 64-bit values of generated code."""
    before = builder.block
    head, inside, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    number = builder.phi(WORD)
    number.add_incoming(WORD(0), before)
    builder.cbranch(builder.icmp_signed("<", number, count), inside, after)
    builder.position_at_end(inside)
    body(number)
    number.add_incoming(builder.add(number, WORD(1)), builder.block)
    builder.branch(head)
    builder.position_at_end(after)


def function(module: ir.Module, name: str, arguments: int) -> tuple[ir.IRBuilder, Sequence[Any]]:
    """A new function of so many 64-bit arguments that returns nothing."""
    kind = ir.FunctionType(ir.VoidType(), [WORD] * arguments)
    made = ir.Function(module, kind, name)
    made.attributes.add("nounwind")
    return ir.IRBuilder(made.append_basic_block("entry")), made.args
