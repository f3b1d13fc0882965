"""GGUF files: the header read once, the tensors mapped.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. The `gguf` package's own reader
builds an array per field and needs seconds for a vocabulary; this one needs a fraction of one.
Files split by llama.cpp (`name-00001-of-00003.gguf`) are read as one.
"""

from __future__ import annotations

import hashlib
import mmap
import re
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TypeVar

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from numpy.typing import NDArray

from raygraft.graph.errors import ModelFileError
from raygraft.graph.tensors import QuantizedTensor, TensorInfo, WeightSlice, take_slice

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
SPLIT_NAME = re.compile(r"^(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")

_SCALARS: dict[GGUFValueType, str] = {
    GGUFValueType.UINT8: "B",
    GGUFValueType.INT8: "b",
    GGUFValueType.UINT16: "H",
    GGUFValueType.INT16: "h",
    GGUFValueType.UINT32: "I",
    GGUFValueType.INT32: "i",
    GGUFValueType.FLOAT32: "f",
    GGUFValueType.BOOL: "?",
    GGUFValueType.UINT64: "Q",
    GGUFValueType.INT64: "q",
    GGUFValueType.FLOAT64: "d",
}
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """What tells whether a file on another machine is the same one, without reading its weights."""

    path: str
    size: int
    modified_ns: int
    header_bytes: int
    header_sha256: str

    def same_file(self, other: FileIdentity | None) -> bool:
        """Whether both name the same content. The time counts: checkpoints share their headers."""
        return other is not None and (self.size, self.modified_ns, self.header_sha256) == (
            other.size,
            other.modified_ns,
            other.header_sha256,
        )


class _Cursor:
    """Reads little-endian values from a header, and says where a file ends too early."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path = path
        self.data = data
        self.position = 0

    def take(self, size: int, what: str) -> int:
        start = self.position
        if size > len(self.data) - start:
            raise ModelFileError(
                f"{self.path}: truncated: {what} needs {size} bytes at offset {start}, "
                f"the file has {len(self.data)} in all"
            )
        self.position = start + size
        return start

    def scalar(self, code: str, what: str) -> int:
        start = self.take(struct.calcsize("<" + code), what)
        value: int = struct.unpack_from("<" + code, self.data, start)[0]
        return value

    def string(self, what: str) -> str:
        size = self.scalar("Q", what)
        start = self.take(size, what)
        return self.data[start : start + size].decode("utf-8", errors="replace")

    def value(self, what: str) -> object:
        kind = self._type(what)
        if kind is GGUFValueType.STRING:
            return self.string(what)
        if kind is GGUFValueType.ARRAY:
            return self._array(what)
        return self.scalar(_SCALARS[kind], what)

    def _type(self, what: str) -> GGUFValueType:
        kind = self.scalar("I", what)
        try:
            return GGUFValueType(kind)
        except ValueError as error:
            raise ModelFileError(f"{self.path}: {what} has the unknown type {kind}") from error

    def _array(self, what: str) -> list[object]:
        kind, count = self._type(what), self.scalar("Q", what)
        if kind is GGUFValueType.ARRAY:
            raise ModelFileError(f"{self.path}: {what} is an array of arrays")
        if kind is GGUFValueType.STRING:
            return self._strings(count, what)
        code = _SCALARS[kind]
        start = self.take(count * struct.calcsize("<" + code), what)
        return list(struct.unpack_from(f"<{count}{code}", self.data, start))

    def _strings(self, count: int, what: str) -> list[object]:
        """As `string`, for vocabularies: a call less for each of a hundred thousand."""
        data, position, size_at = self.data, self.position, struct.Struct("<Q").unpack_from
        found: list[object] = []
        end = len(data)
        for _ in range(count):
            start = position + 8
            if start > end or (size := size_at(data, position)[0]) > end - start:
                self.position = position
                self.string(what)  # says what is missing
            position = start + size
            found.append(data[start:position].decode("utf-8", errors="replace"))
        self.position = position
        return found


def _parse(path: Path, number: int) -> tuple[dict[str, object], dict[str, TensorInfo], int]:
    """Metadata, tensors and header length of one file. Nothing of the weights is touched."""
    size = path.stat().st_size
    with path.open("rb") as file:
        if (found := file.read(4)) != MAGIC:
            raise ModelFileError(
                f"{path}: not a GGUF file: it starts with {found!r}, not {MAGIC!r}"
            )
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            cursor = _Cursor(path, data)
            cursor.take(4, "the magic")
            version = cursor.scalar("I", "the version")
            if version not in VERSIONS:
                raise ModelFileError(
                    f"{path}: GGUF version {version}; readable are {VERSIONS}, little-endian"
                )
            tensor_count = cursor.scalar("Q", "the tensor count")
            entry_count = cursor.scalar("Q", "the metadata count")
            metadata: dict[str, object] = {}
            for index in range(entry_count):
                key = cursor.string(f"metadata key {index} of {entry_count}")
                metadata[key] = cursor.value(key)
            tensors = [_tensor(cursor, index, number) for index in range(tensor_count)]
            header = cursor.position
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0:
        raise ModelFileError(f"{path}: general.alignment is {alignment!r}")
    start = -(-header // alignment) * alignment
    placed = {
        t.name: TensorInfo(t.name, t.shape, t.type, number, start + t.offset) for t in tensors
    }
    for info in placed.values():
        if info.offset + info.nbytes > size:
            raise ModelFileError(
                f"{path}: truncated: {info.name} ends at byte {info.offset + info.nbytes}, "
                f"the file has {size}"
            )
    return metadata, placed, header


def _tensor(cursor: _Cursor, index: int, number: int) -> TensorInfo:
    name = cursor.string(f"tensor name {index}")
    dimensions = cursor.scalar("I", name)
    if not 1 <= dimensions <= 4:
        raise ModelFileError(f"{cursor.path}: {name} has {dimensions} dimensions, not 1 to 4")
    shape = tuple(cursor.scalar("Q", name) for _ in range(dimensions))[::-1]
    kind = cursor.scalar("I", name)
    offset = cursor.scalar("Q", name)
    try:
        quantization = GGMLQuantizationType(kind)
        block = GGML_QUANT_SIZES[quantization][0]
    except (ValueError, KeyError) as error:
        raise ModelFileError(f"{cursor.path}: {name} has the unknown tensor type {kind}") from error
    if shape[-1] % block or 0 in shape:
        raise ModelFileError(
            f"{cursor.path}: {name} of shape {shape} does not fill blocks of {block} "
            f"({quantization.name})"
        )
    return TensorInfo(name, shape, quantization.name, number, offset)


def _identity(path: Path, header: int) -> FileIdentity:
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(header)).hexdigest()
    status = path.stat()
    return FileIdentity(str(path), status.st_size, status.st_mtime_ns, header, digest)


def _split_paths(path: Path, metadata: Mapping[str, object]) -> list[Path]:
    count = metadata.get("split.count", 1)
    if not isinstance(count, int) or count <= 1:
        return [path]
    match = SPLIT_NAME.match(path.name)
    if match is None or int(match["count"]) != count:
        raise ModelFileError(
            f"{path}: one of {count} files of a split model, "
            f"but not named like name-00001-of-{count:05}.gguf"
        )
    names = [f"{match['stem']}-{n:05}-of-{count:05}.gguf" for n in range(1, count + 1)]
    paths = [path.with_name(name) for name in names]
    missing = [p.name for p in paths if not p.is_file()]
    if missing:
        raise ModelFileError(f"{path}: split in {count} files, missing {', '.join(missing)}")
    return paths


@dataclass(frozen=True, slots=True)
class ModelFile:
    """The header of a model: metadata and where its tensors lie. Small, and can be pickled."""

    path: Path
    metadata: Mapping[str, object]
    tensors: Mapping[str, TensorInfo]
    files: tuple[FileIdentity, ...]

    @classmethod
    def open(cls, path: str | Path) -> ModelFile:
        """Read the header of a GGUF file, and of its siblings when it is split.

        Raises ModelFileError when a file is missing, is no GGUF, or ends too early.
        """
        path = Path(path).expanduser()
        if not path.is_file():
            raise ModelFileError(f"{path}: no such file")
        try:
            metadata, tensors, header = _parse(path, 0)
            paths = _split_paths(path, metadata)
            files = [_identity(path, header)]
            if len(paths) > 1:
                tensors, files = {}, []
                for number, part in enumerate(paths):
                    more, found, header = _parse(part, number)
                    if repeated := tensors.keys() & found.keys():
                        raise ModelFileError(f"{part}: repeats the tensor {min(repeated)}")
                    metadata = more if number == 0 else metadata
                    tensors |= found
                    files.append(_identity(part, header))
        except OSError as error:
            raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
        return cls(paths[0], metadata, tensors, tuple(files))

    def __reduce__(self) -> tuple[Callable[..., ModelFile], tuple[object, ...]]:
        return ModelFile, (self.path, dict(self.metadata), dict(self.tensors), self.files)

    def get(self, key: str, kind: type[_T], default: _T | None = None) -> _T:
        """A metadata value of the given Python type; ModelFileError when missing or of another."""
        value = self.metadata.get(key, default)
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if value is None:
            raise ModelFileError(f"{self.path}: the metadata lacks {key}")
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise ModelFileError(f"{self.path}: {key} is {value!r}, not of type {kind.__name__}")
        return value


def local_identity(expected: FileIdentity) -> FileIdentity | None:
    """The identity of the file at `expected.path` on this machine; None when there is none."""
    try:
        return _identity(Path(expected.path), expected.header_bytes)
    except OSError:
        return None


def _map(path: str) -> mmap.mmap:
    with Path(path).open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


class MappedWeights:
    """Weight slices straight from the mapped files of this machine (a `WeightSource`)."""

    def __init__(self, files: tuple[FileIdentity, ...], tensors: Mapping[str, TensorInfo]) -> None:
        self._tensors = MappingProxyType(dict(tensors))
        self._files = files
        self._mapped = [_map(file.path) for file in files]
        self._maps: list[NDArray[np.uint8]] = [
            np.frombuffer(mapped, np.uint8) for mapped in self._mapped
        ]

    def read(self, weight: WeightSlice) -> QuantizedTensor:
        """The raw bytes of a slice, as a view of the mapped file."""
        info = self._tensors[weight.tensor]
        raw = self._maps[info.file][info.offset : info.offset + info.nbytes]
        return take_slice(raw, info, weight)

    def release(self) -> None:
        """Let go of the memory that pages read so far take; what is read again comes again."""
        for mapped in self._mapped:
            if hasattr(mmap, "MADV_DONTNEED"):
                mapped.madvise(mmap.MADV_DONTNEED)

    def key(self, weight: WeightSlice) -> str:
        """What names the bytes of a slice, wherever the file lies (a `KeyedSource`)."""
        info = self._tensors[weight.tensor]
        file = self._files[info.file]
        whole = (file.size, file.modified_ns, file.header_sha256)
        return repr((whole, info.name, weight.axis, weight.start, weight.end(info)))
