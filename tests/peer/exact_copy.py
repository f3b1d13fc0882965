"""A copy of a GGUF whose tensors are all F32: what llama.cpp computes exactly.

llama.cpp quantises the activations of quantised weights to 8 bits; with F32 weights it does not.
"""

import mmap
import struct
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType
from gguf.constants import GGML_QUANT_SIZES, GGUF_DEFAULT_ALIGNMENT
from gguf.quants import dequantize

# Sizes of the fixed-width metadata values, from the gguf specification (docs/gguf.md of ggml).
VALUE_BYTES = {
    GGUFValueType.UINT8: 1,
    GGUFValueType.INT8: 1,
    GGUFValueType.UINT16: 2,
    GGUFValueType.INT16: 2,
    GGUFValueType.UINT32: 4,
    GGUFValueType.INT32: 4,
    GGUFValueType.FLOAT32: 4,
    GGUFValueType.BOOL: 1,
    GGUFValueType.UINT64: 8,
    GGUFValueType.INT64: 8,
    GGUFValueType.FLOAT64: 8,
}


class Tensor(NamedTuple):
    """A tensor's entry in the header; `offset` counts from the start of the data."""

    name: bytes
    dimensions: tuple[int, ...]
    kind: GGMLQuantizationType
    offset: int

    @property
    def elements(self) -> int:
        return int(np.prod(self.dimensions))

    @property
    def bytes(self) -> int:
        block, size = GGML_QUANT_SIZES[self.kind]
        return self.elements // block * size


class Header:
    """A cursor over the header of one GGUF file (version 3, little-endian, not split)."""

    def __init__(self, data: "mmap.mmap") -> None:
        self.data = data
        self.position = 8  # past magic and version
        self.alignment = GGUF_DEFAULT_ALIGNMENT
        tensor_count, self.metadata_count = self._number("Q"), self._number("Q")
        start = self.position
        for _ in range(self.metadata_count):
            self._skip_pair()
        self.metadata = data[start : self.position]
        self.tensors = [self._tensor() for _ in range(tensor_count)]
        self.data_start = aligned(self.position, self.alignment)

    def _number(self, kind: str) -> int:
        (number,) = struct.unpack_from("<" + kind, self.data, self.position)
        self.position += struct.calcsize("<" + kind)
        return int(number)

    def _string(self) -> bytes:
        length = self._number("Q")
        self.position += length
        return self.data[self.position - length : self.position]

    def _skip_pair(self) -> None:
        key, kind = self._string(), self._number("I")
        if key == b"general.alignment":
            self.alignment = self._number("I")
        else:
            self._skip_value(kind)

    def _skip_value(self, kind: int) -> None:
        if kind == GGUFValueType.STRING:
            self._string()
        elif kind == GGUFValueType.ARRAY:
            element, count = self._number("I"), self._number("Q")
            if element in VALUE_BYTES:
                self.position += VALUE_BYTES[GGUFValueType(element)] * count
            else:
                for _ in range(count):
                    self._skip_value(element)
        else:
            self.position += VALUE_BYTES[GGUFValueType(kind)]

    def _tensor(self) -> Tensor:
        name = self._string()
        dimensions = tuple(self._number("Q") for _ in range(self._number("I")))
        return Tensor(name, dimensions, GGMLQuantizationType(self._number("I")), self._number("Q"))


def aligned(position: int, alignment: int) -> int:
    """The first multiple of `alignment` from `position` on."""
    return -(-position // alignment) * alignment


def write_f32_copy(source: Path, target: Path) -> Path:
    """Writes `source` to `target` with every tensor dequantised to F32, one at a time.

    The metadata stays byte for byte (so `general.file_type` still names the old type, which
    llama.cpp only prints). A gigabyte takes about half a minute. Returns `target`.
    """
    target = Path(target)
    with (
        Path(source).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
        target.open("wb") as out,
    ):
        header = Header(data)
        _write_header(out, header)
        for tensor in header.tensors:
            out.write(bytes(aligned(out.tell(), header.alignment) - out.tell()))
            start = header.data_start + tensor.offset
            raw = np.frombuffer(data[start : start + tensor.bytes], dtype=np.uint8)
            # Whole blocks in a row: the quantisations know no other boundaries.
            dequantize(raw.reshape(-1, raw.size), tensor.kind).astype("<f4").tofile(out)
    return target


def _write_header(out: BinaryIO, header: Header) -> None:
    out.write(b"GGUF" + struct.pack("<IQQ", 3, len(header.tensors), header.metadata_count))
    out.write(header.metadata)
    offset = 0
    for tensor in header.tensors:
        out.write(struct.pack("<Q", len(tensor.name)) + tensor.name)
        out.write(struct.pack("<I", len(tensor.dimensions)))
        out.write(struct.pack(f"<{len(tensor.dimensions)}Q", *tensor.dimensions))
        out.write(struct.pack("<IQ", GGMLQuantizationType.F32, offset))
        offset = aligned(offset + 4 * tensor.elements, header.alignment)
