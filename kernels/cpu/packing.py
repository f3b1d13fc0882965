"""Weights ready for the kernels."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from raygraft.graph.tensors import QuantizedTensor, WeightForm
from raygraft.kernels.cpu.formats import Bytes, Format, format_of
from raygraft.kernels.cpu.lanes import LANES

_ROWS = 2048
"""Rows that are packed at once, so that unpacked numbers take little memory."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight matrix. The array `[tiles, bytes of a tile]` owns the memory."""

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


def packed_bytes(form: WeightForm) -> int:
    """Memory of a packed matrix, or of a vector, which is kept as F32."""
    kind, shape = form
    if len(shape) == 1:
        return shape[0] * 4
    return -(-shape[0] // LANES) * format_of(kind).tile_bytes(shape[1])


def pack(weight: QuantizedTensor) -> PackedWeight:
    """Pack a matrix `[rows, columns]`."""
    kind = format_of(weight.type)
    rows, columns = weight.shape
    data = np.empty((-(-rows // LANES), kind.tile_bytes(columns)), np.uint8)
    for first in range(0, rows, _ROWS):
        raw = weight.data[first : first + _ROWS]
        if kind.name != weight.type:
            some = QuantizedTensor(weight.type, (len(raw), columns), raw)
            raw = some.dequantise().view(np.uint8)
        missing = -len(raw) % LANES
        if missing:
            raw = np.concatenate([raw, np.zeros((missing, raw.shape[1]), np.uint8)])
        tiles = slice(first // LANES, (first + len(raw)) // LANES)
        data[tiles] = kind.pack(np.ascontiguousarray(raw), columns)
    return PackedWeight(kind, rows, columns, data)
