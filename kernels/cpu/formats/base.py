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

from raygraft.kernels.cpu.lanes import LANES, LARGEST_TABLE, WORD, Address, Lanes, repeat

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


GroupsBody = Callable[[Sequence[Group]], None]
"""Writes code for neighbouring groups."""


class Format(ABC):
    """A way to pack weights."""

    name: ClassVar[str]
    per_group: ClassVar[int]
    """Columns of a group."""
    has_offset: ClassVar[bool] = False

    @abstractmethod
    def tile_bytes(self, columns: int) -> int:
        """Bytes of a tile with so many columns."""

    @abstractmethod
    def pack(self, raw: Bytes, columns: int) -> Bytes:
        """Bytes of the file, `[rows (a multiple of 16), bytes of a row]`, as `[tiles, bytes]`."""

    @abstractmethod
    def each_groups(
        self, builder: ir.IRBuilder, tile: Address, columns: Any, body: GroupsBody
    ) -> None:
        """Generate loops over a tile's columns, with `body` called for the groups they repeat."""


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
    per_group = CHUNK
    bits: ClassVar[int]
    """Of a number: 2 to 6, or 8 for a signed byte."""
    levels: ClassVar[Sequence[float]] = ()
    """What the numbers stand for, if they are not evenly spaced."""
    centre: ClassVar[int] = 0
    """The number that stands for zero, if they are."""

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
    def _table(self) -> Sequence[float]:
        """What the numbers stand for; none where the table would be too large.

        Those are packed as signed numbers.
        """
        table = self.levels or [number - self.centre for number in range(2**self.bits)]
        return table if len(table) <= LARGEST_TABLE else ()

    @property
    def _groups(self) -> int:
        """Groups of a chunk."""
        return CHUNK // self.per_group

    @property
    def _chunk_bytes(self) -> int:
        return LANES * (len(self.scales) * self._groups + self.bits * CHUNK // _BYTE_BITS)

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
        words = _words(numbers if self._table else numbers - self.centre, self.bits)
        parts += [lanes_last(words[..., n], chunks) for n in range(words.shape[-1])]
        body = np.concatenate(parts, axis=3).reshape(tiles, blocks, -1)
        head = [lanes_last(fields[name]) for name in self.halves]
        return np.concatenate([*head, body], axis=2).reshape(tiles, -1)

    def each_groups(
        self, builder: ir.IRBuilder, tile: Address, columns: Any, body: GroupsBody
    ) -> None:
        def each_block(block: Any) -> None:
            at = tile + builder.mul(block, WORD(self._block_bytes))
            halves = {name: (at + 2 * LANES * n).halves() for n, name in enumerate(self.halves)}
            chunks = at + 2 * LANES * len(self.halves)
            first = builder.mul(block, WORD(self.columns))

            def each_chunk(number: Any) -> None:
                chunk = chunks + builder.mul(number, WORD(self._chunk_bytes))
                column = builder.add(first, builder.mul(number, WORD(CHUNK)))
                body(self._groups_of(chunk, column, halves))

            if self.columns == CHUNK:
                body(self._groups_of(chunks, first, halves))
            else:
                repeat(builder, WORD(self.columns // CHUNK), each_chunk)

        repeat(builder, builder.udiv(columns, WORD(self.columns)), each_block)

    def _groups_of(self, chunk: Address, first: Any, halves: Mapping[str, Lanes]) -> list[Group]:
        numbers = chunk + LANES * len(self.scales) * self._groups
        number = _reader(numbers, self.bits, self._table)
        groups = []
        for group in range(self._groups):
            fields = dict(halves)
            for n, name in enumerate(self.scales):
                fields[name] = self.read_scale(chunk + LANES * (n * self._groups + group))
            column = chunk.builder.add(first, WORD(self.per_group * group))
            own = functools.partial(_of_group, number, self.per_group * group)
            scale, offset = self.scale(fields), self.offset(fields)
            groups.append(Group(column, self.per_group, scale, offset, own))
        return groups


def _of_group(number: Callable[[int], Lanes], start: int, column: int) -> Lanes:
    return number(start + column)


def _layout(bits: int) -> tuple[int, int]:
    """How many numbers a word holds whole, and how many of its bits are left: they are the lowest.

    The words of 32 columns have just room enough: what is left of them, two bits of each or none,
    makes the last two columns.
    """
    return divmod(_WORD_BITS, bits)


def _words(numbers: NDArray[Any], bits: int) -> NDArray[Any]:
    """Numbers `[..., 32]` as words `[..., bits]`, or as they are, when they are bytes."""
    if bits == _BYTE_BITS:
        return numbers
    wide = numbers.astype(np.uint32) & (2**bits - 1)
    whole, left = _layout(bits)
    shifts = (left + bits * np.arange(whole)).astype(np.uint32)
    parted = wide[..., : whole * bits].reshape(*wide.shape[:-1], bits, whole)
    words: NDArray[np.uint32] = np.bitwise_or.reduce(parted << shifts, axis=-1)
    if left:
        last = wide[..., -2] | wide[..., -1] << bits
        words |= last[..., None] >> (left * np.arange(bits)).astype(np.uint32) & (2**left - 1)
    return words


def _reader(at: Address, bits: int, table: Sequence[float]) -> Callable[[int], Lanes]:
    """Generated code that reads the numbers of a chunk: column -> 16 floats."""
    if bits == _BYTE_BITS:
        return lambda column: (at + LANES * column).signed().floats()
    whole, left = _layout(bits)

    @functools.cache
    def word(place: int) -> Lanes:
        return (at + 4 * LANES * place).words()

    @functools.cache
    def last_two() -> Lanes:
        mask = (1 << left) - 1
        found = word(0) & mask
        for place in range(1, bits):
            found = (word(place) << left * place) & (mask << left * place) | found
        return found

    def number(column: int) -> Lanes:
        place, index = divmod(column, whole)
        if place < bits:
            own, lowest = word(place), left + bits * index
        else:
            own, lowest = last_two(), bits * (column - whole * bits)
        if table:
            return (own >> lowest).look_up(table)
        return own.signed_bits(lowest, bits).floats()

    return number
