"""Weights on the GPU, in their own quantisation."""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp, prod
from typing import Any

import numpy as np

from raygraft.graph.rotary import RotaryEmbedding
from raygraft.graph.tensors import QuantizedTensor, WeightForm, row_bytes
from raygraft.kernels.cuda.formats import FORMATS, PACKED_AS, TILE, Format, pack
from raygraft.kernels.cuda.gpu import Gpu

_UPLOAD_BYTES = 64 * 2**20
"""Of a matrix that are packed at once: packing takes a few times as much."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """A quantised matrix in tiles. The array owns the memory."""

    format: Format
    rows: int
    columns: int
    data: Any
    scale: float
    """What its numbers are multiplied with."""

    @property
    def tiles(self) -> int:
        return -(-self.rows // TILE)

    @property
    def chunks(self) -> int:
        """Of the format's own columns."""
        return self.format.chunks(self.columns)

    @property
    def address(self) -> int:
        return int(self.data.data.ptr)


@dataclass(frozen=True, slots=True)
class Floats:
    """A matrix or vector in float32, as it stands in the file."""

    shape: tuple[int, ...]
    data: Any

    @property
    def address(self) -> int:
        return int(self.data.data.ptr)


Weight = PackedMatrix | Floats


def readable(kind: str, dimensions: int) -> bool:
    """Whether a weight of this type can be loaded."""
    return kind in PACKED_AS or kind == "F32" or dimensions == 1


def loaded_bytes(form: WeightForm) -> int:
    """Memory of a loaded weight."""
    kind, shape = form
    if len(shape) == 1 or kind not in PACKED_AS:
        return prod(shape) * 4
    rows, columns = prod(shape[:-1]), shape[-1]
    return -(-rows // TILE) * FORMATS[PACKED_AS[kind]].tile_bytes(columns)


def load_weight(gpu: Gpu, name: str, raw: QuantizedTensor) -> Weight:
    """Copy a weight to the GPU and pack it there. Raises CapacityError."""
    if len(raw.shape) == 1 or raw.type == "F32":
        values = raw.dequantise()
        room = gpu.allocate(name, values.shape, "float32")
        room.set(values)
        return Floats(values.shape, room)
    return _load_matrix(gpu, name, raw)


def _load_matrix(gpu: Gpu, name: str, raw: QuantizedTensor) -> PackedMatrix:
    rows, columns = prod(raw.shape[:-1]), raw.shape[-1]
    kind = PACKED_AS[raw.type]
    form = FORMATS[kind]
    data = raw.data.reshape(rows, row_bytes(raw.type, columns))
    scale = _power_below(data) if raw.type == "BF16" else 1.0
    tile_bytes = form.tile_bytes(columns)
    room = gpu.allocate(name, (loaded_bytes((raw.type, raw.shape)),), "uint8")
    at_once = max(1, _UPLOAD_BYTES // (data.shape[1] * TILE)) * TILE
    for start in range(0, rows, at_once):
        part = gpu.cupy.asarray(np.ascontiguousarray(data[start : start + at_once]))
        if raw.type == "BF16":
            part = _halves(gpu.cupy, part, scale)
        packed = pack(gpu.cupy, kind, part, columns)
        first = start // TILE * tile_bytes
        room[first : first + packed.size] = packed
    return PackedMatrix(form, rows, columns, room, scale)


def _power_below(data: np.ndarray[Any, np.dtype[np.uint8]]) -> float:
    """The power of two that brings BF16 numbers into the range of halves, with room to spare."""
    largest = int((data.view(np.uint16) & 0x7FFF).max(initial=0)) << 16
    return 2.0 ** (frexp(float(np.uint32(largest).view(np.float32)))[1] - 14)


def _halves(cupy: Any, part: Any, scale: float) -> Any:
    wide = (part.view(cupy.uint16).astype(cupy.uint32) << 16).view(cupy.float32)
    return (wide * cupy.float32(1 / scale)).astype(cupy.float16).view(cupy.uint8)


def angles(rotary: RotaryEmbedding, context: int, factors: Any) -> Any:
    """Cosine and sine of each position's pairs, NumPy float32 `[context, size / 2, 2]`."""
    turned = np.arange(context)[:, None] * rotary.frequencies(factors)
    pairs = np.stack([np.cos(turned), np.sin(turned)], axis=-1) * rotary.magnitude
    return np.ascontiguousarray(pairs, np.float32)
