"""How weights lie in memory, and packing them so. Works on NumPy's arrays and on CuPy's.

A matrix is cut into tiles of 16 rows, a tile into chunks of 64 columns (256 for formats with
super-blocks), a chunk into quants and scales; `source/formats.cuh` reads them. In a chunk each lane
of a warp finds its operands for tensor cores side by side: lane 4 g + t owns, of rows g and g + 8
and of every 16 columns, columns 4 t to 4 t + 3. Halves lie in whole rows, as cuBLAS wants them.
Bytes are as many as in the file, but for rows that fill the last tile and columns that fill the
last chunk.

The blocks of the file are described in `ggml-common.h`
(https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

TILE = 16
Array = Any
"""uint8, of NumPy or CuPy."""


@dataclass(frozen=True, slots=True)
class Format:
    """A packing."""

    name: str
    """As in `source/formats.cuh`."""
    columns: int
    """Of a chunk."""
    chunk_bytes: int
    """Of 16 rows."""
    block: int
    """Columns of a block in the file."""
    pack: Callable[[Any, Array], Array]
    """(array module, uint8 [rows (a multiple of 16), columns of whole chunks / block, bytes of a
    block]) -> uint8 [tiles, chunks, bytes of a chunk]."""
    in_rows: bool = False
    """Whether the rows of a tile lie whole, one after another, not chunk by chunk."""

    def tile_bytes(self, columns: int) -> int:
        """Bytes of 16 rows."""
        return self.chunks(columns) * self.chunk_bytes

    def chunks(self, columns: int) -> int:
        return -(-columns // self.columns)


def pack(xp: Any, kind: str, raw: Array, columns: int) -> Array:
    """Pack rows of a file's bytes, uint8 `[rows, bytes of a row]`, as a flat uint8 array.

    `xp` is the array module. Rows and columns are filled up with zeros.
    """
    form = FORMATS[kind]
    rows = raw.shape[0]
    per_row = columns // form.block
    blocks = raw.reshape(rows, per_row, -1)
    whole = form.chunks(columns) * form.columns // form.block
    full = (-(-rows // TILE) * TILE, whole, blocks.shape[2])
    if full != blocks.shape:
        filled = xp.zeros(full, xp.uint8)
        filled[:rows, :per_row] = blocks
        blocks = filled
    return form.pack(xp, blocks).reshape(-1)


def _grid(values: Array, columns: int) -> Array:
    """Numbers `[rows, columns]` as [tile, row half, g, chunk, s, t, j of a lane]."""
    tiles = values.shape[0] // TILE
    return values.reshape(tiles, 2, 8, -1, 4, 4, 4)


def _bytes(quants: Array) -> Array:
    """[tile, chunk, row half, lane, s, j]: a byte each."""
    grid = _grid(quants, 64).transpose(0, 3, 1, 2, 5, 4, 6)
    return grid.reshape(*grid.shape[:2], -1)


def _nibbles(quants: Array) -> Array:
    """Four bits each: words whose halves hold neighbours; 16 bytes a lane."""
    grid = _grid(quants, 64)
    tiles, _, _, chunks = grid.shape[:4]
    # [tile, half, g, chunk, pair of s, s in it, t, j high, j low]
    grid = grid.reshape(tiles, 2, 8, chunks, 2, 2, 4, 2, 2)
    words = grid[..., 0, :] | grid[..., 1, :] << 4
    # -> [tile, chunk, g, t, half, pair of s, j low, s in it]
    return words.transpose(0, 3, 2, 6, 1, 4, 7, 5).reshape(tiles, chunks, -1)


def _fifth_bits(bits: Array) -> Array:
    """One bit each: a word per lane; bit `half * 8 + s * 2 + j // 2`, 16 further for odd j."""
    grid = _grid(bits, 64)
    tiles, _, _, chunks = grid.shape[:4]
    grid = grid.reshape(tiles, 2, 8, chunks, 4, 4, 2, 2)  # ..., s, t, j high, j low
    total = sum(
        grid[:, :, :, :, s, :, high, :] << (2 * s + high) for s in range(4) for high in (0, 1)
    )
    # [tile, half, g, chunk, t, j low] -> [tile, chunk, g, t, j low, half]
    return total.transpose(0, 3, 2, 4, 5, 1).reshape(tiles, chunks, -1)


def _upper_pairs(bits: Array) -> Array:
    """Two bits each: a word per lane and row half; bit `4 * s + 2 * (j // 2)`, 16 on for odd j."""
    grid = _grid(bits, 64)
    tiles, _, _, chunks = grid.shape[:4]
    grid = grid.reshape(
        tiles, 2, 8, chunks, 2, 2, 4, 2, 2
    )  # ..., s pair, s in it, t, j high, j low
    total = sum(
        grid[:, :, :, :, :, s, :, high, :] << (2 * (2 * s + high))
        for s in (0, 1)
        for high in (0, 1)
    )
    # [tile, half, g, chunk, s pair, t, j low] -> [tile, chunk, g, t, half, j low, s pair]
    return total.transpose(0, 3, 2, 5, 1, 6, 4).reshape(tiles, chunks, -1)


def _scales(field: Array) -> Array:
    """Fields of blocks of 32, `[rows, blocks, bytes]`, as [tile, chunk, g, row half, block]."""
    tiles, size = field.shape[0] // TILE, field.shape[2]
    grid = field.reshape(tiles, 2, 8, -1, 2, size).transpose(0, 3, 2, 1, 4, 5)
    return grid.reshape(*grid.shape[:2], -1)


def _by_row(field: Array) -> Array:
    """A field of each super-block, `[rows, super-blocks, bytes]`, row after row."""
    tiles = field.shape[0] // TILE
    grid = field.reshape(tiles, TILE, *field.shape[1:]).transpose(0, 2, 1, 3)
    return grid.reshape(*grid.shape[:2], -1)


def _halves_of_bytes(xp: Any, data: Array) -> Array:
    """[..., n] bytes -> [..., 2 n]: all low nibbles, then all high ones."""
    return xp.concatenate([data & 15, data >> 4], axis=-1)


def _flat(values: Array) -> Array:
    return values.reshape(values.shape[0], -1)


def _pack_q8_0(xp: Any, blocks: Array) -> Array:
    return xp.concatenate([_bytes(_flat(blocks[..., 2:])), _scales(blocks[..., :2])], axis=2)


def _pack_small(fields: int, bits: bool) -> Callable[[Any, Array], Array]:
    """Blocks of 32 with so many halves first, then 32 fifth bits, then 16 bytes of nibbles."""

    def pack_blocks(xp: Any, blocks: Array) -> Array:
        start = 2 * fields
        parts = [_nibbles(_flat(_halves_of_bytes(xp, blocks[..., -16:])))]
        if bits:
            places = xp.arange(8, dtype=xp.uint8)
            spread = blocks[..., start : start + 4, None] >> places & 1
            parts.append(_fifth_bits(spread.reshape(blocks.shape[0], -1)))
        parts += [_scales(blocks[..., 2 * n : 2 * n + 2]) for n in range(fields)]
        return xp.concatenate(parts, axis=2)

    return pack_blocks


def _pack_mxfp4(xp: Any, blocks: Array) -> Array:
    quants = _nibbles(_flat(_halves_of_bytes(xp, blocks[..., 1:])))
    return xp.concatenate([quants, _scales(blocks[..., :1])], axis=2)


def _super(parts: Array, chunks: int) -> Array:
    """Parts of four chunks of 64 columns, one after another in each chunk of 256."""
    return parts.reshape(parts.shape[0], chunks, -1)


def _pack_k(xp: Any, blocks: Array, bits: bool) -> Array:
    chunks = blocks.shape[1]
    # Bytes 32 n to 32 n + 31 hold columns 64 n to 64 n + 31 below, and the 32 that follow above.
    nibbles = _halves_of_bytes(xp, blocks[..., -128:].reshape(*blocks.shape[:2], 4, 32))
    parts = [_super(_nibbles(_flat(nibbles)), chunks)]
    if bits:  # bit n of byte i belongs to column 32 n + i
        places = xp.arange(8, dtype=xp.uint8)[:, None]
        spread = blocks[..., 16:48][..., None, :] >> places & 1
        parts.append(_super(_fifth_bits(_flat(spread)), chunks))
    parts.append(
        _by_row(xp.concatenate([blocks[..., :4], _six_bits(xp, blocks[..., 4:16])], axis=2))
    )
    return xp.concatenate(parts, axis=2)


def _six_bits(xp: Any, packed: Array) -> Array:
    """Twelve bytes with eight scales and minima: for every 64 columns 24 bits, in order."""
    a, b, c = packed[..., :4], packed[..., 4:8], packed[..., 8:]
    scales = xp.concatenate([a & 63, (c & 15) | (a >> 6) << 4], axis=-1).astype(xp.uint32)
    minima = xp.concatenate([b & 63, (c >> 4) | (b >> 6) << 4], axis=-1).astype(xp.uint32)
    fields = scales[..., 0::2] | minima[..., 0::2] << 6
    fields = fields | scales[..., 1::2] << 12 | minima[..., 1::2] << 18
    three = xp.stack([fields & 255, fields >> 8 & 255, fields >> 16 & 255], axis=-1)
    return three.astype(xp.uint8).reshape(*packed.shape[:2], 12)


def _pack_q6_k(xp: Any, blocks: Array) -> Array:
    rows, chunks = blocks.shape[:2]
    # For each 128 columns: 64 bytes of nibbles (below: columns 0 to 63), 32 of upper pairs.
    low = _halves_of_bytes(xp, blocks[..., :128].reshape(rows, chunks, 2, 64))
    places = xp.arange(0, 8, 2, dtype=xp.uint8)[:, None]
    high = blocks[..., 128:192].reshape(rows, chunks, 2, 1, 32) >> places & 3
    parts = [
        _super(_nibbles(_flat(low)), chunks),
        _super(_upper_pairs(_flat(high)), chunks),
        _by_row(blocks[..., 192:208]),
        _by_row(blocks[..., 208:210]),
    ]
    return xp.concatenate(parts, axis=2)


FORMATS = {
    form.name: form
    for form in (
        Format("F16", 64, 2048, 1, lambda xp, blocks: xp.ascontiguousarray(blocks), in_rows=True),
        Format("Q8_0", 64, 1088, 32, _pack_q8_0),
        Format("Q4_0", 64, 576, 32, _pack_small(1, False)),
        Format("Q4_1", 64, 640, 32, _pack_small(2, False)),
        Format("Q5_0", 64, 704, 32, _pack_small(1, True)),
        Format("Q5_1", 64, 768, 32, _pack_small(2, True)),
        Format("MXFP4", 64, 544, 32, _pack_mxfp4),
        Format("Q4_K", 256, 2304, 256, lambda xp, blocks: _pack_k(xp, blocks, False)),
        Format("Q5_K", 256, 2816, 256, lambda xp, blocks: _pack_k(xp, blocks, True)),
        Format("Q6_K", 256, 3360, 256, _pack_q6_k),
    )
}

PACKED_AS = {kind: kind for kind in FORMATS} | {"BF16": "F16"}
"""A file's type -> how it is packed."""
