"""Packed weights on disk, as Arrow IPC files that are mapped into memory.

The second load of a model copies nothing and packs nothing, and actors of one machine share the
pages. A file is named by what it was made from (the model file's identity and the slice) and by
the sources of the packing; it appears whole or not at all, so that two actors may write it at once.
Beyond `RAYGRAFT_PACKED_BYTES` (32 GiB unless set, and never more than half of the disk's free
space) the files that were unused longest go first; 0 turns the cache off.

A file is one of Arrow's tensor messages, `[tiles, bytes of a tile]`, whose data are aligned to 64
bytes: https://arrow.apache.org/docs/format/Other.html
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
from pathlib import Path

import numpy as np
import pyarrow as pa

from raygraft.graph.tensors import QuantizedTensor
from raygraft.kernels.cache_folder import cache_path
from raygraft.kernels.compiled import content_key
from raygraft.kernels.cpu.formats import Bytes, format_of
from raygraft.kernels.cpu.packing import PackedWeight, pack

_log = logging.getLogger(__name__)
_LARGEST = 32 * 2**30
_UNFINISHED = ".part"
_OUTDATED = 3600.0
"""Seconds after which a file that nobody finished is removed."""


def packed_folder() -> Path:
    """The folder of packed weights."""
    return cache_path() / "packed"


def cached(key: str, weight: QuantizedTensor) -> PackedWeight:
    """A matrix packed: from the cache, or packed now and kept for the next time.

    A disk that is full or cannot be written costs the cache, nothing else.
    """
    name = hashlib.sha256(f"{key} {_layout()}".encode()).hexdigest()
    path = packed_folder() / f"{name}.arrow"
    packed: PackedWeight | None = None
    try:
        if not path.exists():
            packed = pack(weight)
            if not _write(path, packed.data):
                return packed
        rows, columns = weight.shape
        return PackedWeight(format_of(weight.type), rows, columns, _map(path))
    except (OSError, pa.ArrowException) as error:
        _log.warning("packed weights cannot be kept in %s: %s", path.parent, error)
        return packed or pack(weight)


@functools.cache
def _layout() -> str:
    """A digest of the sources that say how weights are packed."""
    here = Path(__file__).parent
    return content_key([here / "packing.py", *sorted((here / "formats").glob("*.py"))])


def _map(path: Path) -> Bytes:
    os.utime(path)  # the time of last use: what decides which file goes first
    with pa.memory_map(str(path)) as file:
        tensor = pa.ipc.read_tensor(file)
    return np.asarray(tensor.to_numpy())


def _write(path: Path, data: Bytes) -> bool:
    """Write a file, unless there is no room for it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not _make_room(path.parent, data.nbytes):
        return False
    handle, name = tempfile.mkstemp(suffix=_UNFINISHED, dir=path.parent)
    try:
        os.close(handle)
        with pa.OSFile(name, "wb") as file:
            pa.ipc.write_tensor(pa.Tensor.from_numpy(data), file)
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
