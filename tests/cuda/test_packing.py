"""Packed weights, read as the kernels' lanes read them, are the file's weights."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants
from gguf.constants import GGML_QUANT_SIZES

from raygraft.kernels.cuda.formats import FORMATS, TILE, pack
from raygraft.kernels.cuda.weights import loaded_bytes

SCALES = {"Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2),
          "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "MXFP4": ()}  # fmt: skip
"""Where a block's halves stand, which must not be random bytes."""


def random_rows(kind: str, rows: int, columns: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    if kind == "F16":
        values = rng.standard_normal((rows, columns)).astype(np.float16)
        return values.view(np.uint8)
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for place in SCALES[kind]:
        halves = rng.uniform(0.1, 1, (*raw.shape[:2], 1)).astype(np.float16)
        raw[..., place : place + 2] = halves.view(np.uint8)
    if kind == "MXFP4":
        raw[..., 0] = rng.integers(120, 130, raw.shape[:2])
    return raw.reshape(rows, -1)


class Lanes:
    """Reads a chunk as `formats.cuh` does: lane 4 g + t, 64 columns `sub`, step s, element j."""

    def __init__(self, kind: str, chunk: np.ndarray) -> None:
        self.kind, self.chunk = kind, chunk

    def word(self, start: int, index: int) -> int:
        return int(self.chunk[start : start + 4 * index + 4].view(np.uint32)[index])

    def half(self, place: int) -> float:
        return float(self.chunk[place : place + 2].view(np.float16)[0])

    def number(  # noqa: PLR0911  # one for each format
        self, lane: int, sub: int, row: int, s: int, j: int
    ) -> float:
        """Element j of step s, of row g (row 0) or g + 8 (row 1)."""
        g, high, odd = lane // 4, j >> 1, j & 1
        at = sub * 32 + lane

        def nibble() -> int:
            return (
                self.word(0, at * 4 + row * 2 + (s >> 1)) >> (8 * (s & 1) + 4 * high + 16 * odd)
                & 15
            )

        def fifth(start: int) -> int:
            return (self.word(start, at) >> (8 * row + 2 * s + high + 16 * odd) & 1) << 4

        def small(start: int) -> float:
            return self.half(start + g * 8 + (s >> 1) * 2 + row * 4)

        match self.kind:
            case "F16":
                r, t = g + 8 * row, lane % 4
                piece = (2 * s + (t >> 1)) ^ (r & 3) << 1
                return self.half(r * 128 + piece * 16 + (t & 1) * 8 + j * 2)
            case "Q8_0":
                return int(self.chunk[row * 512 + lane * 16 + s * 4 + j].view(np.int8)) * small(
                    1024
                )
            case "Q4_0":
                return (nibble() - 8) * small(512)
            case "Q4_1":
                return nibble() * small(512) + small(576)
            case "Q5_0":
                return ((nibble() | fifth(512)) - 16) * small(640)
            case "Q5_1":
                return (nibble() | fifth(512)) * small(640) + small(704)
            case "MXFP4":
                n = nibble()
                bits = np.array([(n & 8) << 12 | (n & 7) << 9], np.uint16)
                exponent = int(self.chunk[512 + g * 4 + row * 2 + (s >> 1)])
                return float(bits.view(np.float16)[0]) * 2.0 ** (exponent - 127 + 14)
            case "Q6_K":
                r = g + 8 * row
                upper = self.word(2048, at * 2 + row) >> (4 * s + 2 * high + 16 * odd) & 3
                scale = int(self.chunk[3072 + 16 * r + 4 * sub + s].view(np.int8))
                return self.half(3328 + 2 * r) * scale * ((nibble() | upper << 4) - 32)
        five = self.kind == "Q5_K"
        start = 2048 + (512 if five else 0) + 16 * (g + 8 * row)
        fields = int.from_bytes(self.chunk[start + 4 : start + 16].tobytes(), "little")
        fields >>= 24 * sub + 12 * (s >> 1)
        q = nibble() | (fifth(2048) if five else 0)
        return self.half(start) * (fields & 63) * q - self.half(start + 2) * (fields >> 6 & 63)


def in_shared_memory(rows: np.ndarray) -> np.ndarray:
    """Sixteen pieces of rows, 128 bytes each, as `fetch` in `matvec.cu` lays them down."""
    chunk = np.zeros_like(rows).reshape(TILE, 8, 16)
    for row, piece in np.ndindex(TILE, 8):
        chunk[row, piece ^ (row & 3) << 1] = rows[row, 16 * piece : 16 * piece + 16]
    return chunk.reshape(-1)


@pytest.mark.parametrize("kind", FORMATS)
def test_lanes_find_their_weights(kind):
    form = FORMATS[kind]
    rows, columns = 19, {"F16": 70, "Q8_0": 96}.get(kind, 2 * max(48, form.columns))
    columns -= columns % form.block
    raw = random_rows(kind, rows, columns)
    exact = quants.dequantize(raw, GGMLQuantizationType[kind]).reshape(rows, columns)
    packed = pack(np, kind, raw, columns)
    assert packed.size == loaded_bytes((kind, (rows, columns)))
    found = np.zeros((2 * TILE, form.chunks(columns) * form.columns), np.float32)
    tiles = packed.reshape(2, form.chunks(columns), form.chunk_bytes)
    if form.in_rows:
        pieces = packed.reshape(2, TILE, form.chunks(columns), -1).transpose(0, 2, 1, 3)
        tiles = np.array([[in_shared_memory(piece) for piece in tile] for tile in pieces])
    for tile, chunks in enumerate(tiles):
        for number, chunk in enumerate(chunks):
            lanes = Lanes(kind, chunk)
            for lane, sub, row, s, j in np.ndindex(32, form.columns // 64, 2, 4, 4):
                column = number * form.columns + sub * 64 + s * 16 + lane % 4 * 4 + j
                place = tile * TILE + lane // 4 + 8 * row
                found[place, column] = lanes.number(lane, sub, row, s, j)
    np.testing.assert_allclose(found[:rows, :columns], exact, rtol=1e-6, atol=1e-6)
    assert not found[rows:].any()
    assert not found[:, columns:].any()


@pytest.mark.parametrize("kind", FORMATS)
def test_nothing_is_inflated(kind):
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    assert loaded_bytes((kind, (32, 512))) == 32 * 512 // block * size
