"""Records: what travels between actors, and how it lies in bytes.

An encoded record is little-endian:

| bytes | what |
|---|---|
| 40 | magic, kind, number of tensors, transfer, half-batch, epoch, step, size of the whole record |
| 24 per tensor | data type, number of dimensions, rows, columns |
| | the tensors' bytes in C order, each beginning at a multiple of 64 |

The dimensions travel with every tensor, because the number of rows differs from record to record.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import numpy as np
import numpy.typing as npt

from raygraft.graph.errors import LinkError

Array = npt.NDArray[Any]
Buffer = memoryview | npt.NDArray[np.uint8]

_MAGIC = 0x5247
_HEADER = struct.Struct("<HBBii4xqqQ")
_TENSOR = struct.Struct("<BB6xQQ")
_ALIGNMENT = 64  # one cache line, and a 16-lane float vector

_TYPES = tuple(np.dtype(name) for name in ("float32", "float16", "int32", "int64", "uint8"))
_CODES = {dtype: code for code, dtype in enumerate(_TYPES)}


class RecordKind(IntEnum):
    """What a record asks of its receiver."""

    DATA = 1  # tensors of one transfer of the plan
    STEP = 2  # the engine's step header
    SHUTDOWN = 3  # leave the resident loop


_KINDS = {int(kind): kind for kind in RecordKind}  # faster than the enumeration's own look-up


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """One message between two actors.

    `tensors` are 1-D or 2-D, C-contiguous, of float32, float16, int32, int64 or uint8. `transfer`
    says which transfer of the plan a DATA record belongs to, in a STEP record how many half-batches
    its round has.
    """

    kind: RecordKind
    epoch: int
    step: int
    half_batch: int
    transfer: int = 0
    tensors: tuple[Array, ...] = ()

    def nbytes(self) -> int:
        """Size of the encoded record in bytes."""
        return _layout((tensor.nbytes for tensor in self.tensors), len(self.tensors))


def encoded_size(shapes_and_dtypes: Iterable[tuple[Sequence[int], npt.DTypeLike]]) -> int:
    """Bytes that a record of such tensors takes: the least size of a slot for it.

    Each item is (shape, data type), the shape with the most rows that a step may have.
    """
    sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in shapes_and_dtypes]
    return _layout(sizes, len(sizes))


def encode_into(record: Record, buffer: Buffer) -> int:
    """Write a record at the start of `buffer` (bytes); returns how many bytes it took.

    Raises LinkError when the buffer is too small, saying by how much, and for a tensor that
    cannot travel.
    """
    for tensor in record.tensors:
        if tensor.dtype not in _CODES or tensor.ndim not in (1, 2) or not tensor.flags.c_contiguous:
            raise LinkError(f"{describe(record)} holds {_fault(tensor)}")
    needed = record.nbytes()
    view = _as_view(buffer)
    if needed > view.nbytes:
        raise LinkError(f"{describe(record)} needs {needed} bytes, the slot has {view.nbytes}")
    fields = (record.transfer, record.half_batch, record.epoch, record.step, needed)
    _HEADER.pack_into(view, 0, _MAGIC, record.kind, len(record.tensors), *fields)
    meta = _HEADER.size
    offset = _payload_start(len(record.tensors))
    for tensor in record.tensors:
        rows, columns = tensor.shape if tensor.ndim == 2 else (tensor.shape[0], 1)
        _TENSOR.pack_into(view, meta, _CODES[tensor.dtype], tensor.ndim, rows, columns)
        meta += _TENSOR.size
        if tensor.nbytes:  # an empty array cannot be viewed as bytes
            view[offset : offset + tensor.nbytes] = tensor.data.cast("B")
        offset = _aligned(offset + tensor.nbytes)
    return needed


def decode(buffer: Buffer) -> Record:
    """Read the record at the start of `buffer`; its tensors are copies, so the bytes are free.

    Raises LinkError for bytes that are no record, or hold only a part of one.
    """
    view = _as_view(buffer)
    if view.nbytes < _HEADER.size:
        raise LinkError(f"a record has at least {_HEADER.size} bytes, there are {view.nbytes}")
    magic, kind, count, *fields = _HEADER.unpack_from(view)
    transfer, half_batch, epoch, step, size = fields
    if magic != _MAGIC or kind not in _KINDS:
        raise LinkError(f"expected a record (magic {_MAGIC:#x}), found {magic:#x}, kind {kind}")
    if size > view.nbytes:
        raise LinkError(f"a record of {size} bytes in a buffer of {view.nbytes}")
    tensors = []
    offset = _payload_start(count)
    for meta in range(_HEADER.size, _HEADER.size + count * _TENSOR.size, _TENSOR.size):
        code, dimensions, rows, columns = _TENSOR.unpack_from(view, meta)
        shape = (rows, columns) if dimensions == 2 else (rows,)
        tensor: Array = np.ndarray(shape, _TYPES[code], view, offset).copy()
        tensors.append(tensor)
        offset = _aligned(offset + tensor.nbytes)
    return Record(_KINDS[kind], epoch, step, half_batch, transfer, tuple(tensors))


def describe(record: Record) -> str:
    """A record in words, for messages."""
    return (
        f"{record.kind.name} record of epoch {record.epoch}, step {record.step}, "
        f"half-batch {record.half_batch}, transfer {record.transfer}"
    )


def _as_view(buffer: Buffer) -> memoryview:
    return buffer if isinstance(buffer, memoryview) else buffer.data


def _fault(tensor: Array) -> str:
    layout = "C-contiguous" if tensor.flags.c_contiguous else "strided"
    return (
        f"a {layout} {tensor.dtype} tensor of shape {tensor.shape}; C-contiguous tensors of one or "
        f"two dimensions can travel, of {', '.join(str(dtype) for dtype in _TYPES)}"
    )


def _layout(sizes: Iterable[int], count: int) -> int:
    end = _payload_start(count)
    for size in sizes:
        end = _aligned(end + size)
    return end


def _payload_start(count: int) -> int:
    return _aligned(_HEADER.size + count * _TENSOR.size)


def _aligned(offset: int) -> int:
    return (offset + _ALIGNMENT - 1) & -_ALIGNMENT
