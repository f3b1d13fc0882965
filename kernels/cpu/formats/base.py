"""What describes a weight format, and what follows from a description.

Packed weights lie in tiles of sixteen rows, so that one load fills the lanes of a vector. A format
of blocks holds, for each block of columns of a tile: its `halves` (one float16 a row), then chunks
of 32 columns: the `scales` of its groups (one byte a row), then the numbers, in words of 32 bits
that hold as many columns as fit, so that no lane ever needs another lane's bits. A packed weight
has as many bytes as in the file, or a few per cent more where the file squeezes its scales.

The blocks of the file are described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
and `ggml-common.h`.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from llvmlite import ir
from numpy.typing import NDArray

from raygraft.kernels.cpu.lanes import LANES, WORD, Address, Lanes, repeat

Bytes = NDArray[np.uint8]
Fields = Mapping[str, NDArray[Any]]
CHUNK = 32
"""Columns of a chunk."""
PANEL = 256
"""Every format's blocks divide so many columns."""
_WORD_BITS = 32
_BYTE_BITS = 8


@dataclass(frozen=True)
class Group:
    """Columns that share a scale, in generated code: weight = scale * number + offset."""

    column: Any
    """The first of them."""
    count: int
    scale: Lanes | None
    offset: Lanes | None
    number: Callable[[int], Lanes]
    """The lanes of one of its columns, as floats."""


class Format(ABC):
    """A way to pack weights."""

    name: ClassVar[str]

    @property
    def sums(self) -> int:
        """How many columns of x make a sum that products need; 0 for formats without offsets."""
        return 0

    @abstractmethod
    def tile_bytes(self, columns: int) -> int:
        """Bytes of a tile with so many columns."""

    @abstractmethod
    def pack(self, raw: Bytes, columns: int) -> Bytes:
        """Bytes of the file, `[rows (a multiple of 16), bytes of a row]`, as `[tiles, bytes]`."""

    @abstractmethod
    def each_group(
        self, builder: ir.IRBuilder, tile: Address, columns: Any, body: Callable[[Group], None]
    ) -> None:
        """Generate loops over a tile's columns, with `body` called for what they repeat."""


class BlockFormat(Format):
    """A format of blocks. Subclasses say what a block holds, and how it is read."""

    columns: ClassVar[int]
    """Of a block."""
    file_bytes: ClassVar[int]
    """Of a row's block in the file."""
    halves: ClassVar[Sequence[str]] = ("d",)
    """Fields of float16, one for each block."""
    scales: ClassVar[Sequence[str]] = ()
    """Fields of int8 or uint8, one for each group."""
    per_group: ClassVar[int] = CHUNK
    """Columns of a group."""
    bits: ClassVar[Sequence[int]]
    """How the bits of a number are split into words, lowest first; 8 is a signed byte."""
    table: ClassVar[Sequence[float]] = ()
    """What the numbers stand for, if not for themselves."""
    has_offset: ClassVar[bool] = False

    @abstractmethod
    def unpack(self, blocks: Bytes) -> Fields:
        """All fields of blocks `[n, file_bytes]`.

        Halves are float16 `[n]`, scales `[n, groups]`, `numbers` int8 or uint8 `[n, columns]`.
        """

    @abstractmethod
    def scale(self, fields: Mapping[str, Lanes]) -> Lanes:
        """A group's scale, from its fields as floats."""

    def offset(self, fields: Mapping[str, Lanes]) -> Lanes | None:
        """A group's offset."""
        return None

    def read_scale(self, at: Address) -> Lanes:
        """A field of a group from its bytes: signed, and as floats, unless overridden."""
        return at.signed().floats()

    @property
    def sums(self) -> int:
        return self.per_group if self.has_offset else 0

    @property
    def _groups(self) -> int:
        """Groups of a chunk."""
        return CHUNK // self.per_group

    @property
    def _chunk_bytes(self) -> int:
        return LANES * (len(self.scales) * self._groups + sum(self.bits) * CHUNK // _BYTE_BITS)

    @property
    def _block_bytes(self) -> int:
        """Of a tile."""
        return 2 * LANES * len(self.halves) + self._chunk_bytes * (self.columns // CHUNK)

    def tile_bytes(self, columns: int) -> int:
        return columns // self.columns * self._block_bytes

    def pack(self, raw: Bytes, columns: int) -> Bytes:
        tiles, blocks, chunks = len(raw) // LANES, columns // self.columns, self.columns // CHUNK
        fields = self.unpack(raw.reshape(-1, self.file_bytes))

        def lanes_last(values: NDArray[Any], *shape: int) -> Bytes:
            """`[tiles * 16 * blocks, ...]` as bytes `[tiles, blocks, *shape]`."""
            parted = values.reshape(tiles, LANES, blocks, *shape, -1)
            moved = np.moveaxis(parted, 1, -2)  # [tiles, blocks, *shape, 16, per lane]
            return np.ascontiguousarray(moved).view(np.uint8).reshape(tiles, blocks, *shape, -1)

        parts = []
        for name in self.scales:
            groups = fields[name].reshape(-1, chunks, self._groups)
            parts += [lanes_last(groups[..., g], chunks) for g in range(self._groups)]
        numbers = fields["numbers"].reshape(-1, chunks, CHUNK)
        for words in _words(numbers, self.bits):
            parts += [lanes_last(words[..., n], chunks) for n in range(words.shape[-1])]
        body = np.concatenate(parts, axis=3).reshape(tiles, blocks, -1)
        head = [lanes_last(fields[name]) for name in self.halves]
        return np.concatenate([*head, body], axis=2).reshape(tiles, -1)

    def each_group(
        self, builder: ir.IRBuilder, tile: Address, columns: Any, body: Callable[[Group], None]
    ) -> None:
        def each_block(block: Any) -> None:
            at = tile + builder.mul(block, WORD(self._block_bytes))
            halves = {name: (at + 2 * LANES * n).halves() for n, name in enumerate(self.halves)}
            chunks = at + 2 * LANES * len(self.halves)
            first = builder.mul(block, WORD(self.columns))
            if self.columns == CHUNK:
                self._each_group_of(builder, chunks, first, halves, body)
                return
            repeat(
                builder,
                WORD(self.columns // CHUNK),
                lambda number: self._each_group_of(
                    builder,
                    chunks + builder.mul(number, WORD(self._chunk_bytes)),
                    builder.add(first, builder.mul(number, WORD(CHUNK))),
                    halves,
                    body,
                ),
            )

        repeat(builder, builder.udiv(columns, WORD(self.columns)), each_block)

    def _each_group_of(
        self,
        builder: ir.IRBuilder,
        chunk: Address,
        first: Any,
        halves: Mapping[str, Lanes],
        body: Callable[[Group], None],
    ) -> None:
        numbers = chunk + LANES * len(self.scales) * self._groups
        number = _reader(numbers, self.bits, self.table)
        for group in range(self._groups):
            fields = dict(halves)
            for n, name in enumerate(self.scales):
                fields[name] = self.read_scale(chunk + LANES * (n * self._groups + group))
            column = builder.add(first, WORD(self.per_group * group))
            own = functools.partial(_of_group, number, self.per_group * group)
            body(Group(column, self.per_group, self.scale(fields), self.offset(fields), own))


def _of_group(number: Callable[[int], Lanes], start: int, column: int) -> Lanes:
    return number(start + column)


def _words(numbers: NDArray[Any], bits: Sequence[int]) -> list[NDArray[Any]]:
    """Numbers `[..., 32]` as words `[..., words]` for each part of their bits."""
    found, taken = [], 0
    for own in bits:
        if own == _BYTE_BITS:
            found.append(numbers)
            continue
        part = (numbers.astype(np.uint32) >> taken) & (2**own - 1)
        columns = _WORD_BITS // own
        shifted = part.reshape(*part.shape[:-1], -1, columns) << (own * np.arange(columns))
        found.append(np.bitwise_or.reduce(shifted.astype(np.uint32), axis=-1))
        taken += own
    return found


def _reader(at: Address, bits: Sequence[int], table: Sequence[float]) -> Callable[[int], Lanes]:
    """Generated code that reads the numbers of a chunk: column -> 16 floats."""
    if bits[0] == _BYTE_BITS:
        return lambda column: (at + LANES * column).signed().floats()
    loaded: dict[tuple[int, int], Lanes] = {}

    def shifted(part: int, column: int) -> Lanes:
        """A word with a column's bits lowest."""
        place, bit = divmod(column * bits[part], _WORD_BITS)
        if (part, place) not in loaded:
            before = sum(bits[:part]) * CHUNK // _BYTE_BITS * LANES
            loaded[part, place] = (at + before + 4 * LANES * place).words()
        return loaded[part, place] >> bit

    def number(column: int) -> Lanes:
        low = shifted(0, column)
        if len(bits) == 1 and bits[0] == 4:
            return low.look_up(table or range(16))
        whole, taken = low & ((1 << bits[0]) - 1), bits[0]
        for part in range(1, len(bits)):
            whole = whole | (shifted(part, column) & ((1 << bits[part]) - 1)) << taken
            taken += bits[part]
        return whole.floats()

    return number
