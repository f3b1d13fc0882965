"""Formats that hold every weight as a float: column after column, the sixteen rows side by side."""

from __future__ import annotations

import functools
from typing import Any, ClassVar

import numpy as np
from llvmlite import ir

from raygraft.kernels.cpu.formats.base import Bytes, Format, Group, GroupsBody
from raygraft.kernels.cpu.lanes import LANES, WORD, Address, Lanes, repeat


class DenseFormat(Format):
    """Floats of `size` bytes."""

    per_group = 8
    size: ClassVar[int]

    def read(self, at: Address) -> Lanes:
        """The lanes of one column."""
        raise NotImplementedError

    def tile_bytes(self, columns: int) -> int:
        return self.size * LANES * columns

    def pack(self, raw: Bytes, columns: int) -> Bytes:
        numbers = raw.reshape(-1, LANES, columns, self.size).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(numbers).reshape(len(raw) // LANES, -1)

    def each_groups(
        self, builder: ir.IRBuilder, tile: Address, columns: Any, body: GroupsBody
    ) -> None:
        def group(column: Any, count: int) -> None:
            at = tile + builder.mul(column, WORD(self.size * LANES))
            number = functools.partial(self._number, at)
            body([Group(column, count, None, None, number)])

        size = WORD(self.per_group)
        whole = builder.udiv(columns, size)
        repeat(builder, whole, lambda n: group(builder.mul(n, size), self.per_group))
        done = builder.mul(whole, size)
        rest = builder.sub(columns, done)
        repeat(builder, rest, lambda n: group(builder.add(done, n), 1))

    def _number(self, at: Address, column: int) -> Lanes:
        return self.read(at + self.size * LANES * column)


class F32(DenseFormat):
    name, size = "F32", 4

    def read(self, at: Address) -> Lanes:
        return at.floats()


class F16(DenseFormat):
    name, size = "F16", 2

    def read(self, at: Address) -> Lanes:
        return at.halves()


class BF16(DenseFormat):
    name, size = "BF16", 2

    def read(self, at: Address) -> Lanes:
        return at.bfloats()
