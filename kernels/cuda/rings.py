"""Rings of records in a GPU's memory, which another GPU of the machine writes to.

Between processes the memory is shared by CUDA's interprocess handles
(https://docs.nvidia.com/cuda/cuda-c-programming-guide/#interprocess-communication). Where GPUs
cannot reach each other's memory, a ring lies in the host's, which both of them have mapped. Putting
and taking are launches in the stream, between those of the stages, so that a whole step with all
that it waits for is one CUDA graph.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from raygraft.graph.errors import LinkError
from raygraft.graph.operators import Value
from raygraft.kernels.base import DeviceRing
from raygraft.kernels.cuda import sources
from raygraft.kernels.cuda.arguments import Ring, integer, long_integer, pointer
from raygraft.kernels.cuda.buffers import Counts
from raygraft.kernels.cuda.gpu import Gpu
from raygraft.kernels.cuda.ring_end import RingEnd
from raygraft.kernels.cuda.runner import CudaRunner
from raygraft.kernels.cuda.sampled_rows import Wanted
from raygraft.kernels.cuda.shared import Shared

_HEADER = 512  # as SLOTS in rings.cu
_OWN_WORDS = 3
_SLOT_ALIGNMENT, _VALUE_ALIGNMENT = 128, 64
_UNIT = 16  # bytes of a load; of a small record half of them are its number
_LARGEST_SMALL = 512 << 10
"""Bytes of a record up to which latency counts for more than bandwidth."""
_SPARE_SLOTS = 8
"""With so many a sender seldom has to look in far memory how many records were taken."""
_SPARE_BYTES = 64 << 20
_THREADS = 1024
_MOST_BLOCKS = 64
_PEER_ACCESS = 1  # cudaIpcMemLazyEnablePeerAccess
_PORTABLE, _MAPPED = 1, 2  # cudaHostRegister...
_SAME_ADDRESS = 91  # cudaDevAttrCanUseHostPointerForRegisteredMem


@dataclass(frozen=True, slots=True)
class OpenedRing:
    """What a sender needs to know of a ring."""

    process: int
    gpu: int
    address: int
    handle: bytes
    slots: int
    stride: int
    """Bytes of a slot."""
    host: str = ""
    """The file of the memory, where that is the host's."""

    @property
    def largest_small(self) -> int:
        """Bytes of the largest record that is sent as a small one."""
        return min(self.stride, _LARGEST_SMALL)

    @property
    def size(self) -> int:
        """Bytes of all of it."""
        return _HEADER + self.slots * (self.stride + 2 * self.largest_small)


class HostMemory:
    """Memory of the host that a GPU reads and writes where it lies, shared by processes.

    No name of it is left when the processes are gone.
    """

    def __init__(self, gpu: Gpu, size: int, path: str = "") -> None:
        """New memory, of zeros, or that which another process has. Raises LinkError."""
        self._runtime = gpu.cupy.cuda.runtime
        if not self._runtime.deviceGetAttribute(_SAME_ADDRESS, gpu.number):
            raise LinkError(f"GPU {gpu.number} cannot map memory of the host")
        try:
            self._file = os.open(path, os.O_RDWR) if path else os.memfd_create("raygraft ring")
            if not path:
                os.truncate(self._file, size)
            self._map = mmap.mmap(self._file, size)
        except OSError as error:
            raise LinkError(f"no memory of the host to share: {error}") from error
        self.path = path or f"/proc/{os.getpid()}/fd/{self._file}"
        self._view = np.frombuffer(self._map, np.uint8)
        self.address = int(self._view.ctypes.data)
        self._runtime.hostRegister(self.address, size, _PORTABLE | _MAPPED)

    def close(self) -> None:
        """Let go of it; others keep theirs."""
        self._runtime.hostUnregister(self.address)
        del self._view
        self._map.close()
        os.close(self._file)


class CudaRing(DeviceRing):
    """One end of a ring, on the GPU that takes or on the one that puts."""

    def __init__(
        self, shared: Shared, kernel: str, opened: OpenedRing, address: int, memory: Any = None
    ) -> None:
        """`kernel` is "put" or "take"; `address` is where this process sees the ring's memory."""
        self.shared = shared
        self.kernel = kernel
        self._memory = memory
        self._mapped = address if memory is None and opened.process != os.getpid() else 0
        gpu = shared.gpu
        self._own = gpu.allocate("the counters of a link", (_OWN_WORDS,), "uint64")
        gpu.stream.synchronize()
        # On one GPU, a kernel that waits must leave room for those that it waits for.
        other = (opened.process, opened.gpu) != (os.getpid(), gpu.number)
        self.largest_small = opened.largest_small
        self.argument = Ring(
            address, int(self._own.data.ptr), shared.stop.ctypes.data, opened.stride,
            2 * opened.largest_small, opened.slots, int(other),
        )  # fmt: skip

    def runner(self, values: Sequence[Value]) -> CudaRunner:
        """See `DeviceRing.runner`."""
        return CudaRunner(self.shared, [RingUnit(self, values)])

    def close(self) -> None:
        """See `DeviceRing.close`: memory that others may still see is kept for the next ring."""
        if isinstance(self._memory, HostMemory):
            with self.shared.gpu.active():
                self._memory.close()
        elif self._mapped:
            with suppress(Exception), self.shared.gpu.active():  # its owner may be gone
                self.shared.gpu.cupy.cuda.runtime.ipcCloseMemHandle(self._mapped)
        elif self._memory is not None:
            self.shared.give_back(self._memory)
        self._mapped, self._memory = 0, None


class RingUnit(RingEnd):
    """Takes a record's values from memory that two GPUs have mapped, or puts them there."""

    def __init__(self, ring: CudaRing, values: Sequence[Value]) -> None:
        super().__init__(ring.shared, values, takes=ring.kernel == "take")
        self._ring = ring
        self._gpu = ring.shared.gpu

    def enqueue(self, counts: Counts, wanted: Wanted, given: Mapping[str, int]) -> dict[str, int]:
        """Launch. Nothing follows before a record has been taken, or there was room for it."""
        places = {name: self.address(name, counts) for name in self.made} | dict(given)
        sizes = {
            name: counts.rows(value) * value.row_bytes
            for name, value in self.subgraph.values.items()
        }
        small = sum(map(_aligned, sizes.values())) <= self._ring.largest_small
        name, unit = self._ring.kernel + "_small" * small, _UNIT // 2 if small else _UNIT
        kernel = self._gpu.kernel("rings", name, sources.rings_source)
        last = [*sizes][-1]
        offset = 0
        for value, size in sizes.items():
            count = _aligned(size) // unit
            blocks = min(max(1, -(-count // _THREADS)), _MOST_BLOCKS)
            self._gpu.launch(
                kernel, (blocks, 1, 1), _THREADS,
                (self._ring.argument, pointer(places[value]), long_integer(count),
                 long_integer(offset // unit if small else offset), integer(value == last)),
            )  # fmt: skip
            offset += _aligned(size)
        return {name: places[name] for name in self.made}


def _aligned(size: int) -> int:
    return -(-size // _VALUE_ALIGNMENT) * _VALUE_ALIGNMENT


def open_ring(
    shared: Shared, slots: int, slot_bytes: int, *, through_host: bool = False
) -> tuple[CudaRing, OpenedRing]:
    """A ring in this GPU's memory, or in the host's. Raises CapacityError, LinkError."""
    stride = -(-slot_bytes // _SLOT_ALIGNMENT) * _SLOT_ALIGNMENT
    slots = max(slots, min(_SPARE_SLOTS, _SPARE_BYTES // stride))
    gpu = shared.gpu
    opened = OpenedRing(os.getpid(), gpu.number, 0, b"", slots, stride)
    with gpu.active():
        if through_host:
            in_host = HostMemory(gpu, opened.size)
            opened = replace(opened, address=in_host.address, host=in_host.path)
            return CudaRing(shared, "take", opened, in_host.address, in_host), opened
        memory = shared.exported(opened.size)
        runtime = gpu.cupy.cuda.runtime
        runtime.memset(memory.ptr, 0, opened.size)  # no piece of it is a record's
        opened = replace(opened, address=memory.ptr, handle=runtime.ipcGetMemHandle(memory.ptr))
        return CudaRing(shared, "take", opened, memory.ptr, memory), opened


def join_ring(shared: Shared, opened: OpenedRing) -> CudaRing:
    """The end that puts. Raises LinkError where the GPUs cannot reach each other."""
    gpu = shared.gpu
    runtime = gpu.cupy.cuda.runtime
    with gpu.active():
        if opened.host:
            in_host = HostMemory(gpu, opened.size, opened.host)
            return CudaRing(shared, "put", opened, in_host.address, in_host)
        if opened.process == os.getpid():
            address = opened.address
            if opened.gpu != gpu.number:
                _enable_peer(runtime, gpu.number, opened.gpu)
        else:
            try:
                address = runtime.ipcOpenMemHandle(opened.handle, _PEER_ACCESS)
            except runtime.CUDARuntimeError as error:
                raise LinkError(
                    f"GPU {gpu.number} cannot reach the memory of GPU {opened.gpu}: {error}"
                ) from error
        return CudaRing(shared, "put", opened, address)


def _enable_peer(runtime: Any, own: int, other: int) -> None:
    if not runtime.deviceCanAccessPeer(own, other):
        raise LinkError(f"GPU {own} cannot reach the memory of GPU {other}")
    with suppress(runtime.CUDARuntimeError):  # it was enabled before
        runtime.deviceEnablePeerAccess(other)
