"""From a subgraph to programs: buffers for its values, and instructions that work on them.

There are two programs. The one for few rows, each of another sequence, is for decoding: threads
compute what is cheap each for itself (norms), or keep to the heads that they began with (positions,
cache, attention), so that they meet half as often. The other divides all work among all threads.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from raygraft.graph.capability import Limits
from raygraft.graph.operators import Operator, Value
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.kernels.cpu import attention
from raygraft.kernels.cpu import instructions as at
from raygraft.kernels.cpu.cache import CACHE_CODES, CacheLayout
from raygraft.kernels.cpu.formats import Format
from raygraft.kernels.cpu.fusing import Work, fuse
from raygraft.kernels.cpu.packing import PackedWeight
from raygraft.kernels.cpu.products import format_functions, multiply_functions

Floats = NDArray[np.float32]
Weight = PackedWeight | Floats
_KINDS = {
    "rms_norm": at.NORM,
    "matmul": at.MATMUL,
    "rope": at.ROTATE,
    "add": at.ADD,
    "swiglu": at.GATE,
    "select_rows": at.COPY_ROWS,
    "get_rows": at.LOOK_UP,
}
_SLACK = 16
"""Floats behind every buffer: vectors are loaded whole."""


@dataclass
class Cache:
    """Keys and values of one attention operator."""

    layout: CacheLayout
    keys: NDArray[np.uint8]
    values: NDArray[np.uint8]


@dataclass
class Instruction:
    """One row of a program; see `instructions.py`."""

    kind: int
    a: str = ""
    out: str = ""
    residual: str = ""
    b: str = ""
    own: tuple[int, ...] = ()
    number: float = 0.0
    places: dict[int, int] = field(default_factory=dict)
    """Further numbers and addresses: place -> value."""
    units: int = 0
    """Heads of keys that the work is divided by, if it is."""
    private: bool = False
    """Whether each thread does all of it for itself."""


class Assembler:
    """Makes the programs of one subgraph."""

    def __init__(
        self,
        operators: Sequence[Operator],
        kept: Sequence[str],
        inputs: Sequence[str],
        values: Mapping[str, Value],
        weights: Mapping[str, Mapping[str, Weight]],
        tables: Mapping[str, Floats],
        limits: Limits,
        threads: int,
        spare: dict[int, list[Floats]],
        sampled: str | None = None,
    ) -> None:
        """`spare` holds buffers by width that all subgraphs of a device share: one runs at a time.

        Values in `kept` are whole when the program has ended, and until another one runs. Tokens
        are drawn from the rows of the value that is `sampled`.
        """
        self.work = fuse(operators, kept)
        self._kept = frozenset(kept)
        self._sampled = sampled
        self._values = values
        self._weights = weights
        self._tables = tables
        self._threads = threads
        self._units = _units(operators)
        self.buffers = self._allocate(inputs, limits.max_rows, spare)
        self._private: dict[str, Floats] = {}

    def assemble(self, caches: Mapping[str, Cache], few: bool) -> NDArray[np.int64]:
        """A program `[instructions, fields]`; it holds addresses of buffers, weights and caches."""
        instructions = [i for work in self.work for i in self._translate(work, caches)]
        if self._sampled is not None:
            own = (self._values[self._sampled].width,)
            instructions.append(Instruction(at.LOOK_THROUGH, self._sampled, own=own))
            join = Instruction(at.JOIN, self._sampled, own=own, places={at.MEET: 1})
            instructions.append(join)
        if few:
            self._give_threads_their_own(instructions)
        program = np.zeros((len(instructions), at.FIELDS), np.int64)
        meetings = _Meetings()
        for row, i in zip(program, instructions, strict=True):
            self._write(row, i, few)
            meetings.add(row, i, few)
        return program

    def _give_threads_their_own(self, instructions: Sequence[Instruction]) -> None:
        """Norms for products go to memory of each thread's own."""
        read: dict[str, list[Instruction]] = {}
        for i in instructions:
            for name in (i.a, i.b, i.residual):
                read.setdefault(name, []).append(i)
        for i in instructions:
            readers = read.get(i.out, []) if i.out else []
            only_products = all(j.kind == at.MATMUL and j.a == i.out for j in readers)
            if i.kind == at.NORM and i.out not in self._kept and readers and only_products:
                i.private = True
                if i.out not in self._private:
                    size = at.FEW_ROWS * self._values[i.out].width + _SLACK
                    self._private[i.out] = np.zeros((self._threads, size), np.float32)

    def _write(self, row: NDArray[np.int64], i: Instruction, few: bool) -> None:
        row[at.KIND // 8] = i.kind
        row[at.BY_UNITS // 8] = few and i.units > 0
        for place, name in ((at.A, i.a), (at.B, i.b), (at.C, i.residual), (at.OUT, i.out)):
            if name:
                row[place // 8] = self.buffers[name].ctypes.data
        if few and i.a in self._private:
            row[at.A // 8] = self._private[i.a].ctypes.data
            row[at.A_STEP // 8] = self._private[i.a].strides[0]
        if i.private:
            row[at.OUT // 8] = self._private[i.out].ctypes.data
            row[at.OUT_STEP // 8] = self._private[i.out].strides[0]
        row[at.OWN // 8 : at.OWN // 8 + len(i.own)] = i.own
        row[at.NUMBER // 8 :].view(np.float64)[0] = i.number
        for place, value in i.places.items():
            row[place // 8] = value
        if i.out:
            row[at.LOGIT_SIDE // 8] = self._values[i.out].rows == "logits"
        elif i.kind in (at.LOOK_THROUGH, at.JOIN):
            row[at.LOGIT_SIDE // 8] = 1

    def _allocate(
        self, inputs: Sequence[str], rows: int, spare: dict[int, list[Floats]]
    ) -> dict[str, Floats]:
        """A buffer per value; one that nobody reads any more serves the next value of its width."""
        last = {name: n for n, work in enumerate(self.work) for name in work.inputs}
        if self._sampled is not None:
            last[self._sampled] = len(self.work)
        buffers: dict[str, Floats] = {}
        free = {width: list(some) for width, some in spare.items()}

        def buffer(name: str) -> Floats:
            width = self._values[name].width
            if free.get(width):
                return free[width].pop()
            made = np.zeros(rows * width + _SLACK, np.float32)[: rows * width].reshape(rows, width)
            spare.setdefault(width, []).append(made)
            return made

        for name in inputs:
            if name in last:
                buffers[name] = buffer(name)
        for number, work in enumerate(self.work):
            for name in work.outputs:
                buffers[name] = buffer(name)
            for name in set(work.inputs):
                if last[name] == number and name not in self._kept:
                    free.setdefault(self._values[name].width, []).append(buffers[name])
        return buffers

    def _translate(self, work: Work, caches: Mapping[str, Cache]) -> list[Instruction]:
        op = work.operators[0]
        if op.kind == "attention":
            return self._attention(op, caches[op.name])
        width = self._values[work.outputs[0]].width
        weights = self._weights.get(op.name, {})
        weight = weights.get("weight")
        i = Instruction(_KINDS[work.kind], out=work.outputs[0], own=(width,))
        if work.kind == "matmul":
            assert isinstance(weight, PackedWeight)
            i.a, i.residual = op.inputs[0], work.residual
            i.own = (weight.columns, weight.rows, weight.tiles)
            i.places = _described(at.FIRST, weight)
            if "bias" in weights:
                i.places[at.B] = _address(weights["bias"])
            if len(work.operators) > 1:
                second = self._weights[work.operators[1].name]["weight"]
                assert isinstance(second, PackedWeight)
                i.places |= _described(at.SECOND, second)
            return [i]
        i.a, i.b = (*op.inputs, "", "")[:2]
        if op.kind == "rms_norm":
            assert weight is not None
            i.number = float(dict(op.attributes)["epsilon"])
            i.places = {at.FIRST + at.WEIGHT: _address(weight)}
        elif op.kind == "rope":
            rotary = RotaryEmbedding.from_attributes(op.attributes)
            size = width // rotary.heads
            i.units = self._units.get(op.outputs[0], rotary.heads)
            i.own = (rotary.heads, size, rotary.size, int(rotary.style == "neox"), i.units)
            i.places = {at.FIRST + at.WEIGHT: _address(self._tables[op.name])}
        elif op.kind == "get_rows":
            assert isinstance(weight, PackedWeight)
            i.places = _described(at.FIRST, weight)
        return [i]

    def _attention(self, op: Operator, cache: Cache) -> list[Instruction]:
        """Keys and values into the cache, then the attention itself."""
        assert op.state is not None
        q, k, v = op.inputs
        state, layout = op.state, cache.layout
        heads = state.kv_heads
        common = (heads, layout.block_size, CACHE_CODES[layout.type])
        keys, values = int(cache.keys.ctypes.data), int(cache.values.ctypes.data)
        key = (*common, state.key_size, layout.keys_page, layout.key_tile, 1)
        value = (*common, state.value_size, layout.values_page, layout.value_row, 0)
        attributes = dict(op.attributes)
        functions = int(multiply_functions().ctypes.data)
        own = (*common, int(attributes["heads"]), state.key_size, state.value_size, functions)
        places = {
            at.B: keys,
            at.C: values,
            attention.KEY_TILE: layout.key_tile,
            attention.KEYS_PAGE: layout.keys_page,
            attention.VALUE_ROW: layout.value_row,
            attention.VALUES_PAGE: layout.values_page,
        }
        return [
            Instruction(at.WRITE_CACHE, k, own=key, places={at.OUT: keys}, units=heads),
            Instruction(at.WRITE_CACHE, v, own=value, places={at.OUT: values}, units=heads),
            Instruction(
                at.ATTEND, q, op.outputs[0], own=own, number=float(attributes["scale"]),
                places=places, units=heads,
            ),
        ]  # fmt: skip


class _Meetings:
    """Decides where threads must meet: before one reads or overwrites what another may hold."""

    def __init__(self) -> None:
        self._written: dict[int, int] = {}
        self._read: dict[int, set[int]] = {}
        self._number = 0

    def add(self, row: NDArray[np.int64], i: Instruction, few: bool) -> None:
        """Mark an instruction. Work by the same heads stays with its thread, other work moves."""
        self._number -= 1
        division = i.units if few and i.units else self._number
        reads = [int(row[place // 8]) for place in (at.A, at.B, at.C) if row[place // 8]]
        out = 0 if i.private else int(row[at.OUT // 8])
        moved = any(self._written.get(name, division) != division for name in reads)
        moved |= self._written.get(out, division) != division
        moved |= bool(self._read.get(out, {division}) - {division})
        if moved:
            row[at.MEET // 8] = 1
            self._written, self._read = {}, {}
        if out:
            self._written[out] = division
        for name in reads:
            self._read.setdefault(name, set()).add(division)


def _units(operators: Sequence[Operator]) -> dict[str, int]:
    """Values that attention reads, with its heads of keys."""
    return {
        name: op.state.kv_heads for op in operators if op.state is not None for name in op.inputs
    }


def _described(place: int, weight: PackedWeight) -> dict[int, int]:
    kind = weight.format
    return {
        place + at.WEIGHT: weight.address,
        place + at.FUNCTIONS: int(format_functions(kind).ctypes.data),
        place + at.TILE_BYTES: kind.tile_bytes(weight.columns),
        place + at.SUMS: _needs(kind),
    }


def _needs(kind: Format) -> int:
    """What a product needs of x beside itself: the columns of its sums, or that it is rounded."""
    if kind.in_pairs:
        return at.ROUNDED
    return kind.per_group if kind.has_offset else 0


def _address(weight: Weight) -> int:
    return weight.address if isinstance(weight, PackedWeight) else int(weight.ctypes.data)
