"""Records from GPU to GPU over NCCL, between machines.

Sending and receiving are launches in the stream, as with rings in a GPU's memory, so a step with
all that it waits for stays one CUDA graph. NCCL takes the network that it finds, and encrypts
nothing: https://docs.nvidia.com/deeplearning/nccl/user-guide/docs/usage/p2p.html.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from raygraft.graph.errors import LinkError
from raygraft.graph.operators import Value
from raygraft.kernels.base import DeviceRing
from raygraft.kernels.cuda.buffers import Counts
from raygraft.kernels.cuda.ring_end import RingEnd
from raygraft.kernels.cuda.runner import CudaRunner
from raygraft.kernels.cuda.sampled_rows import Wanted
from raygraft.kernels.cuda.shared import Shared

ON = "RAYGRAFT_NCCL"
"""Set to 1 in the environment of a device, on a network that NCCL is made for: over plain sockets
sealed connections are as fast or faster, and nobody can read them. See docs/benchmarks.md."""
JOIN_SECONDS = 20.0
"""How long the end that puts waits for the other one."""
_TAKER, _PUTTER = 0, 1
_PROCESS = uuid4().hex


def available() -> bool:
    """Whether NCCL is wanted here, and CuPy finds it."""
    if os.environ.get(ON) != "1":
        return False
    try:
        from cupy.cuda import nccl  # noqa: PLC0415  # only where there is a GPU
    except ImportError:
        return False
    return bool(nccl.available)


@dataclass(frozen=True, slots=True)
class OpenedNccl:
    """What a sender needs to know: the name that both ends call a communicator by."""

    process: str
    name: tuple[int, ...]


class NcclRing(DeviceRing):
    """One end of a link: a communicator of two."""

    def __init__(self, shared: Shared, name: tuple[int, ...], rank: int) -> None:
        self.shared = shared
        self.rank = rank
        self._communicator: Any = None
        self._failure: Exception | None = None
        self._met = threading.Event()
        shared.far_links.add(self)
        # Both ends wait for each other in there, and the one that opens must go on.
        threading.Thread(target=self._meet, args=(name,), name="nccl", daemon=True).start()

    def _meet(self, name: tuple[int, ...]) -> None:
        try:
            from cupy.cuda import nccl  # noqa: PLC0415

            with self.shared.gpu.device:
                self._communicator = nccl.NcclCommunicator(2, name, self.rank)
        except Exception as error:  # noqa: BLE001  # handed to who waits
            self._failure = error
        self._met.set()

    def communicator(self, seconds: float = JOIN_SECONDS) -> Any:
        """It, when both ends are there. Raises LinkError."""
        if not self._met.wait(seconds):
            raise LinkError(f"NCCL has found no way to the other GPU in {seconds:.0f} s")
        if self._communicator is None:
            raise LinkError(f"NCCL finds no way to the other GPU: {self._failure or 'closed'}")
        return self._communicator

    def runner(self, values: Sequence[Value]) -> CudaRunner:
        """See `DeviceRing.runner`."""
        return CudaRunner(self.shared, [NcclUnit(self, values)])

    def abort(self) -> None:
        """End what waits on the GPU, from any thread; nothing goes over it any more."""
        communicator, self._communicator = self._communicator, None
        self._failure = self._failure or LinkError("the link was closed")
        self._met.set()
        if communicator is not None:
            with suppress(Exception):  # the other end may be gone
                communicator.abort()

    def close(self) -> None:
        """See `DeviceRing.close`."""
        self.abort()


class NcclUnit(RingEnd):
    """Receives a record's values, or sends them."""

    def __init__(self, ring: NcclRing, values: Sequence[Value]) -> None:
        super().__init__(ring.shared, values, takes=ring.rank == _TAKER)
        self._ring = ring

    def enqueue(self, counts: Counts, wanted: Wanted, given: Mapping[str, int]) -> dict[str, int]:
        """Launch. Nothing follows before a record is there, or on its way."""
        from cupy.cuda import nccl  # noqa: PLC0415

        places = {name: self.address(name, counts) for name in self.made} | dict(given)
        communicator = self._ring.communicator()
        takes = self._ring.rank == _TAKER
        move = communicator.recv if takes else communicator.send
        other = _PUTTER if takes else _TAKER
        stream = self._ring.shared.gpu.stream.ptr
        nccl.groupStart()
        for name, value in self.subgraph.values.items():
            size = counts.rows(value) * value.row_bytes
            if size:
                move(places[name], size, nccl.NCCL_UINT8, other, stream)
        nccl.groupEnd()
        return {name: places[name] for name in self.made}


def open_nccl(shared: Shared) -> tuple[NcclRing, OpenedNccl]:
    """The end that takes. Raises LinkError."""
    from cupy.cuda import nccl  # noqa: PLC0415

    try:
        name = tuple(nccl.get_unique_id())
    except nccl.NcclError as error:
        raise LinkError(f"NCCL cannot be used: {error}") from error
    return NcclRing(shared, name, _TAKER), OpenedNccl(_PROCESS, name)


def join_nccl(shared: Shared, opened: OpenedNccl) -> NcclRing:
    """The end that puts. Raises LinkError when the ends do not find each other."""
    if opened.process == _PROCESS:
        raise LinkError("NCCL connects processes")
    ring = NcclRing(shared, opened.name, _PUTTER)
    try:
        ring.communicator()
    except LinkError:
        ring.close()
        raise
    return ring
