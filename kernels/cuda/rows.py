"""Launches of `rows.cu`: what happens to rows between matrix products."""

from __future__ import annotations

from typing import Any

from raygraft.kernels.cuda import sources
from raygraft.kernels.cuda.arguments import integer, pointer
from raygraft.kernels.cuda.buffers import Buffers
from raygraft.kernels.cuda.gpu import Gpu

THREADS = 256


class RowKernels:
    """The kernels that more than one part of a program launches."""

    def __init__(self, gpu: Gpu, buffers: Buffers) -> None:
        self._gpu = gpu
        self._buffers = buffers

    def launch(self, name: str, grid: tuple[int, int, int], threads: int, *own: Any) -> None:
        """Launch one by its name."""
        kernel = self._gpu.kernel("rows", name, sources.rows_source)
        self._gpu.launch(kernel, grid, threads, own)

    def gate(self, gate: int, up: int, value: str, rows: int, out: int) -> None:
        """silu(gate) * up, or `gate` as it is where `up` is 0: packed, and at `out` unless 0."""
        columns = self._buffers.width(value)
        self.launch(
            "gate_rows", (rows, 1, 1), threads_for(columns), pointer(gate), pointer(up),
            integer(columns), pointer(out), self._buffers.packed(value, rows),
            pointer(self._buffers.scales(value, rows)), integer(columns),
        )  # fmt: skip

    def add(
        self, a: int, b: int, out: int, columns: int, rows: int, *, scales: int = 0, bias: int = 0
    ) -> None:
        """a + b * scale + bias; all but `b` may be 0."""
        blocks = min(-(-columns // THREADS), 64)
        self.launch(
            "add_rows", (blocks, rows, 1), THREADS, pointer(a), pointer(b), integer(columns),
            pointer(scales), pointer(bias), pointer(out), integer(columns),
        )  # fmt: skip


def threads_for(work: int) -> int:
    """Threads of a block that has so many elements to do."""
    return min(1024, max(64, -(-work // 32) * 32))
