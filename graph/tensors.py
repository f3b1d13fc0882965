"""Tensors of a model file: where each lies, slices of them, and their quantised bytes.

Types and their block sizes are the constants of the `gguf` package, which also dequantises
(https://github.com/ggml-org/ggml/blob/master/docs/gguf.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol, runtime_checkable

import numpy as np
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from raygraft.graph.errors import ModelFileError

Shape = tuple[int, ...]
WeightForm = tuple[str, Shape]
"""Type and shape of a weight: all that decides how much memory it takes."""


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of one row of `columns` elements of a type such as "Q4_1".

    Raises ValueError when the columns are no whole number of the type's blocks.
    """
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[type_name]]
    if columns % block:
        raise ValueError(f"{columns} columns are no multiple of {type_name}'s block of {block}")
    return int(columns // block * size)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """One tensor of a model file. `shape` is in NumPy's order: rows first, columns last."""

    name: str
    shape: Shape
    type: str
    file: int
    offset: int

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def rows(self) -> int:
        return prod(self.shape[:-1])

    @property
    def nbytes(self) -> int:
        return self.rows * row_bytes(self.type, self.columns)


@dataclass(frozen=True, slots=True)
class WeightSlice:
    """The part `start:stop` of a tensor along `axis`: some experts, some heads, or all of it.

    `stop=None` means to the end, so `WeightSlice(name)` is the whole tensor.
    """

    tensor: str
    axis: int = 0
    start: int = 0
    stop: int | None = None

    def shape(self, info: TensorInfo) -> Shape:
        """Shape of the slice. Raises ValueError when it lies outside of the tensor."""
        stop = self.end(info)
        shape = list(info.shape)
        shape[self.axis] = stop - self.start
        return tuple(shape)

    def end(self, info: TensorInfo) -> int:
        if not 0 <= self.axis < len(info.shape):
            raise ValueError(f"{info.name} of shape {info.shape} has no axis {self.axis}")
        size = info.shape[self.axis]
        stop = size if self.stop is None else self.stop
        if not 0 <= self.start < stop <= size:
            raise ValueError(f"{self.start}:{stop} lies outside of {info.name}, size {size}")
        return stop

    def nbytes(self, info: TensorInfo) -> int:
        """Bytes of the slice as stored in the file."""
        shape = self.shape(info)
        return prod(shape[:-1]) * row_bytes(info.type, shape[-1])


@dataclass(frozen=True, slots=True)
class QuantizedTensor:
    """Raw weights: `data` is uint8 of shape `shape[:-1] + (bytes of a row,)`."""

    type: str
    shape: Shape
    data: NDArray[np.uint8]

    def dequantise(self) -> NDArray[np.float32]:
        """The weights as float32 of `shape`."""
        kind = GGMLQuantizationType[self.type]
        try:
            values = quants.dequantize(self.data, kind)
        except NotImplementedError as error:
            raise ModelFileError(f"weights of type {self.type} cannot be dequantised") from error
        return np.ascontiguousarray(values, dtype=np.float32).reshape(self.shape)


class WeightSource(Protocol):
    """Where a backend gets its weights from: the file on its machine, or the object store."""

    def read(self, weight: WeightSlice) -> QuantizedTensor:
        """The raw bytes of a slice. The result may be a view of mapped memory."""
        ...


@runtime_checkable
class KeyedSource(WeightSource, Protocol):
    """A source that can name what it would read, so that what is made of it can be kept."""

    def key(self, weight: WeightSlice) -> str:
        """What names the bytes of a slice: equal for equal bytes, on any machine."""
        ...


def take_slice(raw: NDArray[np.uint8], info: TensorInfo, weight: WeightSlice) -> QuantizedTensor:
    """Cut a slice out of a tensor's bytes (`raw`: uint8, as many as `info.nbytes`)."""
    per_row = row_bytes(info.type, info.columns)
    data = raw.reshape(*info.shape[:-1], per_row)
    start, stop = weight.start, weight.end(info)
    if weight.axis == len(info.shape) - 1:
        start, stop = row_bytes(info.type, start), row_bytes(info.type, stop)
    index = [slice(None)] * len(info.shape)
    index[weight.axis] = slice(start, stop)
    return QuantizedTensor(info.type, weight.shape(info), data[tuple(index)])
