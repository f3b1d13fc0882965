"""How weights lie in memory: tiles of sixteen rows, so that one load fills the lanes of a vector.

Block formats hold 32 columns of a tile at a time: scales of the 16 rows, offsets where the format
has them, then for each column the 16 rows' numbers side by side. A weight is `scale * number +
offset`. A packed weight has as many bytes as in the file, but for rows that fill the last tile.
What has no packing of its own is dequantised, and kept as F32.

The blocks of the file are described in https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
and `ggml-common.h`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from raygraft.graph.tensors import QuantizedTensor, WeightForm
from raygraft.kernels.cpu.vector import LANES

Bytes = NDArray[np.uint8]
BLOCK = 32

F32, F16, Q4_0, Q4_1, Q8_0 = range(5)
"""Codes of the formats in compiled programs."""


@dataclass(frozen=True, slots=True)
class Format:
    """A packing. `tile_bytes` is the size of one tile with so many columns."""

    code: int
    name: str
    bytes_per_column: float
    """Of one tile."""
    pack: Callable[[Bytes], Bytes]
    """uint8 `[rows (a multiple of 16), bytes of a row]` -> `[tiles, bytes of a tile]`."""

    def tile_bytes(self, columns: int) -> int:
        return int(columns * self.bytes_per_column)


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight matrix, ready for the kernels. The array owns the memory."""

    format: Format
    rows: int
    columns: int
    data: Bytes

    @property
    def address(self) -> int:
        return int(self.data.ctypes.data)

    @property
    def tiles(self) -> int:
        return len(self.data)


def _pack_blocks(fields: tuple[int, ...], block_bytes: int) -> Callable[[Bytes], Bytes]:
    """Blocks of 32 columns: fields of so many bytes per row first, then a byte per number."""

    def pack(raw: Bytes) -> Bytes:
        tiles = len(raw) // LANES
        blocks = raw.reshape(tiles, LANES, -1, block_bytes)
        parts, start = [], 0
        for size in fields:
            field = blocks[..., start : start + size].transpose(0, 2, 1, 3)
            parts.append(field.reshape(tiles, -1, LANES * size))
            start += size
        numbers = blocks[..., start:].transpose(0, 2, 3, 1)
        parts.append(numbers.reshape(tiles, blocks.shape[2], -1))
        return np.ascontiguousarray(np.concatenate(parts, axis=2).reshape(tiles, -1))

    return pack


def _pack_columns(size: int) -> Callable[[Bytes], Bytes]:
    """Numbers of so many bytes, column by column."""

    def pack(raw: Bytes) -> Bytes:
        tiles = len(raw) // LANES
        numbers = raw.reshape(tiles, LANES, -1, size).transpose(0, 2, 1, 3)
        return np.ascontiguousarray(numbers.reshape(tiles, -1))

    return pack


FORMATS = {
    "F32": Format(F32, "F32", 64, _pack_columns(4)),
    "F16": Format(F16, "F16", 32, _pack_columns(2)),
    "Q4_0": Format(Q4_0, "Q4_0", LANES * 18 / BLOCK, _pack_blocks((2,), 18)),
    "Q4_1": Format(Q4_1, "Q4_1", LANES * 20 / BLOCK, _pack_blocks((2, 2), 20)),
    "Q8_0": Format(Q8_0, "Q8_0", LANES * 34 / BLOCK, _pack_blocks((2,), 34)),
}


def format_of(type_name: str) -> Format:
    """The packing of a type; F32 for those without one."""
    return FORMATS.get(type_name, FORMATS["F32"])


def packed_bytes(form: WeightForm) -> int:
    """Memory of a packed matrix, or of a vector, which is kept as F32."""
    kind, shape = form
    if len(shape) == 1:
        return shape[0] * 4
    return -(-shape[0] // LANES) * format_of(kind).tile_bytes(shape[1])


def pack(weight: QuantizedTensor) -> PackedWeight:
    """Pack a matrix `[rows, columns]`."""
    kind = format_of(weight.type)
    raw = weight.data
    if kind.name != weight.type:
        raw = weight.dequantise().view(np.uint8)
    rows, columns = weight.shape
    missing = -rows % LANES
    if missing:
        raw = np.concatenate([raw, np.zeros((missing, raw.shape[1]), np.uint8)])
    return PackedWeight(kind, rows, columns, kind.pack(raw))
