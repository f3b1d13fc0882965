"""What describes a weight format, and what follows from a description.

Packed weights lie in tiles of sixteen rows, so that one load fills the lanes of a vector. A format
of blocks holds, for each block of columns of a tile: its `halves` (one float16 a row), then chunks
of 32 columns: the `scales` of its groups (one byte a row), then the numbers, in words of 32 bits
that hold as many columns as fit, so that no lane ever needs another lane's bits. The two halves of
a word are alike: each holds numbers in 16 bits, so that one shift and one mask give a pair of
numbers as 16-bit integers, of columns c and c + 8. A packed weight has as many bytes as in the
file, or a few per cent more where the file squeezes its scales.

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

from raygraft.kernels.cpu.lanes import (
    LANES,
    LARGEST_TABLE,
    WORD,
    Address,
    Lanes,
    multiplies_pairs,
    repeat,
)

Bytes = NDArray[np.uint8]
Fields = Mapping[str, NDArray[Any]]
CHUNK = 32
"""Columns of a chunk."""
PANEL = 256
"""Every format's blocks divide so many columns."""
_HALF_BITS = 16
"""Of a word's half."""
_BYTE_BITS = 8


@dataclass(frozen=True)
class Group:
    """Columns that share a scale, in generated code: weight = scale * number + offset.

    With `pair`, number = pair - centre.
    """

    column: Any
    """The first of them."""
    count: int
    scale: Lanes | None
    offset: Lanes | None
    number: Callable[[int], Lanes]
    """The lanes of one of its columns, as floats."""
    pair: Callable[[int], Lanes] | None = None
    """The lanes of two columns as 16-bit integers: pair p is that of columns c and c + 8, where c
    is p, or p + 8 from p = 8 on."""
    centre: int = 0


GroupsBody = Callable[[Sequence[Group]], None]
"""Writes code for neighbouring groups."""


class Format(ABC):
    """A way to pack weights."""

    name: ClassVar[str]
    per_group: ClassVar[int]
    """Columns of a group."""
    has_offset: ClassVar[bool] = False

    @property
    def in_pairs(self) -> bool:
        """Whether products multiply pairs of 16-bit integers; then x is rounded to such."""
        return False

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
    """Of a number: 2 to 6, or 8."""
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
    def in_pairs(self) -> bool:
        return not self.levels and multiplies_pairs()

    @property
    def _table(self) -> Sequence[float]:
        """What the numbers stand for; none where the table would be too large."""
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
        words = _words(fields["numbers"].reshape(-1, chunks, CHUNK), self.bits)
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
        read = _Reader(numbers, self.bits)
        number = functools.partial(self._number, read)
        groups = []
        for group in range(self._groups):
            fields = dict(halves)
            for n, name in enumerate(self.scales):
                fields[name] = self.read_scale(chunk + LANES * (n * self._groups + group))
            column = chunk.builder.add(first, WORD(self.per_group * group))
            own = functools.partial(_of_group, number, self.per_group * group)
            scale, offset = self.scale(fields), self.offset(fields)
            pair = functools.partial(_of_group, read.pair, self.per_group // 2 * group)
            group_of = Group(column, self.per_group, scale, offset, own, pair, self.centre)
            groups.append(group_of)
        return groups

    def _number(self, read: _Reader, column: int) -> Lanes:
        """What the number of a column stands for."""
        pair, lowest = read.place(column)
        if self._table:
            return (pair >> lowest).look_up(self._table)
        number = (pair >> lowest & (1 << self.bits) - 1).floats()
        return number - self.centre if self.centre else number


def _of_group(number: Callable[[int], Lanes], start: int, column: int) -> Lanes:
    return number(start + column)


def _words(numbers: NDArray[Any], bits: int) -> NDArray[np.uint32]:
    """Numbers `[..., 32]` as words `[..., bits]`.

    A half of a word holds as many numbers as fit whole, above the bits that are left, of which the
    last numbers are made. The lower halves hold columns 0 to 7 and 16 to 23 of a chunk.
    """
    whole, left = divmod(_HALF_BITS, bits)
    order = np.arange(CHUNK).reshape(2, 2, 8).swapaxes(0, 1).reshape(2, -1)
    halves = numbers.astype(np.uint32)[..., order] & (2**bits - 1)  # [..., 2, 16]
    shifts = (left + bits * np.arange(whole)).astype(np.uint32)
    parted = halves[..., : whole * bits].reshape(*halves.shape[:-1], bits, whole)
    found: NDArray[np.uint32] = np.bitwise_or.reduce(parted << shifts, axis=-1)
    rest = halves[..., whole * bits :]
    for place in range(bits if left else 0):
        for bit in range(left):
            number, own = divmod(left * place + bit, bits)
            found[..., place] |= (rest[..., number] >> np.uint32(own) & 1) << np.uint32(bit)
    return found[..., 0, :] | found[..., 1, :] << np.uint32(_HALF_BITS)


class _Reader:
    """Generated code that reads the numbers of a chunk."""

    def __init__(self, at: Address, bits: int) -> None:
        self._at = at
        self._bits = bits
        self._whole, self._left = divmod(_HALF_BITS, bits)
        self._words: dict[int, Lanes] = {}
        self._rest: dict[int, Lanes] = {}

    def pair(self, number: int) -> Lanes:
        """The numbers of a pair, in the lower and the upper 16 bits."""
        lanes, lowest = self._place(number)
        mask = (1 << self._bits) - 1
        return lanes >> lowest & (mask | mask << _HALF_BITS)

    def place(self, column: int) -> tuple[Lanes, int]:
        """Lanes that hold the number of a column, and its lowest bit."""
        lanes, lowest = self._place(column // 16 * 8 + column % 8)
        return lanes, lowest + _HALF_BITS * (column % 16 // 8)

    def _place(self, pair: int) -> tuple[Lanes, int]:
        word, index = divmod(pair, self._whole)
        if word < self._bits:
            return self._word(word), self._left + self._bits * index
        return self._rest_of(pair - self._whole * self._bits), 0

    def _word(self, place: int) -> Lanes:
        if place not in self._words:
            self._words[place] = (self._at + 4 * LANES * place).words()
        return self._words[place]

    def _rest_of(self, number: int) -> Lanes:
        """A pair that is made of the bits that others leave in both halves of several words."""
        if number not in self._rest:
            first, last = self._bits * number, self._bits * (number + 1)
            found: Lanes | None = None
            for place in range(first // self._left, -(-last // self._left)):
                begin = max(first, self._left * place)
                count = min(last, self._left * (place + 1)) - begin
                mask = (1 << count) - 1
                own = self._word(place) >> begin - self._left * place
                part = (own & (mask | mask << _HALF_BITS)) << begin - first
                found = part if found is None else found | part
            assert found is not None
            self._rest[number] = found
        return self._rest[number]
