"""Packed weights on disk, as Arrow IPC files that are mapped into memory.

The second load of a model copies nothing and packs nothing, and actors of one machine share the
pages. Matrices that are read one after the other lie in one file: the kernel maps long files in
large pages, and the processor fetches ahead within these. A file is named by what it was made from
(the model file's identity and the slices) and by the sources of the packing; it appears whole or
not at all, so that two actors may write it at once.
Beyond `RAYGRAFT_PACKED_BYTES` (32 GiB unless set, and never more than half of the disk's free
space) the files that were unused longest go first; 0 turns the cache off.

A file is a run of Arrow's tensor messages, `[tiles, bytes of a tile]`, each begun at a multiple of
64 bytes, as are its data: https://arrow.apache.org/docs/format/Other.html
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from raygraft.graph.tensors import QuantizedTensor
from raygraft.kernels.cache_folder import cache_path
from raygraft.kernels.compiled import content_key
from raygraft.kernels.cpu.formats import Bytes, format_of
from raygraft.kernels.cpu.packing import PackedWeight, pack, packed_bytes

_log = logging.getLogger(__name__)
_LARGEST = 32 * 2**30
_ALIGNMENT = 64
_WRITTEN_AT_ONCE = 8 * 2**20
"""Bytes: what is written together lies in pages as large as can be."""
_UNFINISHED = ".part"
_OUTDATED = 3600.0
"""Seconds after which a file that nobody finished is removed."""


def packed_folder() -> Path:
    """The folder of packed weights."""
    return cache_path() / "packed"


def cached(matrices: Mapping[str, QuantizedTensor]) -> list[PackedWeight]:
    """Matrices by their keys, packed: from the cache, or packed now and kept for the next time.

    They lie in one file, in this order. A disk that is full or cannot be written costs the cache,
    nothing else.
    """
    name = hashlib.sha256(" ".join((*matrices, _layout())).encode()).hexdigest()
    path = packed_folder() / f"{name}.arrow"
    weights = [*matrices.values()]
    try:
        if path.exists() or _write(path, weights):
            return _map(path, weights)
    except (OSError, pa.ArrowException) as error:
        _log.warning("packed weights cannot be kept in %s: %s", path.parent, error)
    return [pack(weight) for weight in weights]


@functools.cache
def _layout() -> str:
    """A digest of the sources that say how weights are packed."""
    here = Path(__file__).parent
    return content_key([here / "packing.py", *sorted((here / "formats").glob("*.py"))])


def _map(path: Path, weights: Sequence[QuantizedTensor]) -> list[PackedWeight]:
    os.utime(path)  # the time of last use: what decides which file goes first
    found = []
    with pa.memory_map(str(path)) as file:
        for weight in weights:
            file.seek(file.tell() + -file.tell() % _ALIGNMENT)
            data: Bytes = np.asarray(pa.ipc.read_tensor(file).to_numpy())
            rows, columns = weight.shape
            found.append(PackedWeight(format_of(weight.type), rows, columns, data))
    return found


def _write(path: Path, weights: Sequence[QuantizedTensor]) -> bool:
    """Pack weights into a file, one after the other, unless there is no room for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _make_room(path.parent, sum(packed_bytes((w.type, w.shape)) for w in weights)):
        return False
    handle, name = tempfile.mkstemp(suffix=_UNFINISHED, dir=path.parent)
    try:
        with (
            os.fdopen(handle, "wb", buffering=_WRITTEN_AT_ONCE) as raw,
            pa.PythonFile(raw, "w") as file,
        ):
            for weight in weights:
                file.write(bytes(-file.tell() % _ALIGNMENT))
                pa.ipc.write_tensor(pa.Tensor.from_numpy(pack(weight).data), file)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return True


def _make_room(folder: Path, needed: int) -> bool:
    """Remove what was unused longest until there is room; False when there cannot be."""
    limit = int(os.environ.get("RAYGRAFT_PACKED_BYTES", _LARGEST))
    found = []
    for file in folder.iterdir():
        with contextlib.suppress(FileNotFoundError):  # another actor was faster
            status = file.stat()
            if file.suffix == _UNFINISHED and time.time() - status.st_mtime > _OUTDATED:
                file.unlink()
            elif file.suffix == ".arrow":
                found.append((status.st_mtime, status.st_size, file))
    held = sum(size for _, size, _ in found)
    limit = min(limit, held + shutil.disk_usage(folder).free // 2)
    if needed > limit:
        return False
    for _, size, file in sorted(found):
        if held + needed <= limit:
            break
        file.unlink(missing_ok=True)
        held -= size
    return True
