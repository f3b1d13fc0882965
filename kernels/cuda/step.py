"""What kernels read of a step: tokens, positions, tables, brought to the GPU in one copy."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from raygraft.graph.step import Step
from raygraft.kernels.cuda.buffers import FEW
from raygraft.kernels.cuda.gpu import Gpu

QUERIES = 64
"""Rows of a block of `prompt_attention.cu`."""


@dataclass(frozen=True, slots=True)
class StepAddresses:
    """Where the parts of a step lie on the GPU; `stride` is the length of a block table."""

    tokens: int
    positions: int
    sequence: int
    wanted: int
    tiles: int
    tables: int
    stride: int


class DeviceStep:
    """The step that a device is at. All its subgraphs share it."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._step: Step | None = None
        self._rows = self._sequences = self._stride = 0
        self._staging: deque[Any] = deque()
        """Two, in turns: one is copied from while the next step is written to the other."""
        self._room: Any = None
        self.version = 0
        self.tile_count = 0
        """Blocks of the prompt attention."""
        self.addresses = StepAddresses(0, 0, 0, 0, 0, 0, 0)

    def upload(self, step: Step) -> None:
        """Bring a step to the GPU, once for all subgraphs. Of those before, one may not be done."""
        if step is self._step:
            return
        sequences, width = step.block_tables.shape
        self._ensure(step.rows, sequences, width)
        self._staging.rotate()
        rows, staging = self._rows, self._staging[0]
        tiles = _tiles(step) if step.rows > FEW else np.zeros((0, 3), np.int32)
        parts = (step.tokens, step.positions, step.sequence, step.logit_rows, tiles.reshape(-1))
        for number, values in enumerate(parts):
            staging[number * rows : number * rows + len(values)] = values
        tables = staging[7 * rows :].reshape(-1, self._stride)
        tables[:sequences, :width] = step.block_tables
        used = 7 * rows + sequences * self._stride
        runtime = self._gpu.cupy.cuda.runtime
        runtime.memcpyAsync(
            self.addresses.tokens, staging.ctypes.data, 4 * used, runtime.memcpyHostToDevice,
            self._gpu.stream.ptr,
        )  # fmt: skip
        self.tile_count = len(tiles)
        self._step = step

    def _ensure(self, rows: int, sequences: int, width: int) -> None:
        if rows <= self._rows and sequences <= self._sequences and width <= self._stride:
            return
        self._rows = max(self._rows, 1 << (rows - 1).bit_length())
        self._sequences = max(self._sequences, 1 << (sequences - 1).bit_length())
        self._stride = max(self._stride, 64, 1 << max(0, width - 1).bit_length())
        size = 7 * self._rows + self._sequences * self._stride
        cupy = self._gpu.cupy
        self._gpu.stream.synchronize()
        self._staging = deque(
            np.frombuffer(cupy.cuda.alloc_pinned_memory(4 * size), np.int32, size) for _ in range(2)
        )
        self._room = self._gpu.allocate("the step's description", (size,), "int32")
        first, part = int(self._room.data.ptr), 4 * self._rows
        self.addresses = StepAddresses(
            tokens=first,
            positions=first + part,
            sequence=first + 2 * part,
            wanted=first + 3 * part,
            tiles=first + 4 * part,
            tables=first + 7 * part,
            stride=self._stride,
        )
        self.version += 1


def _tiles(step: Step) -> np.ndarray[Any, np.dtype[np.int32]]:
    """At most QUERIES rows of a sequence at consecutive positions: first, count, sequence."""
    breaks = (np.diff(step.sequence) != 0) | (np.diff(step.positions) != 1)
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    stops = np.concatenate([starts[1:], [step.rows]])
    found = [
        (row, min(QUERIES, int(stop) - row), int(step.sequence[start]))
        for start, stop in zip(starts, stops, strict=True)
        for row in range(int(start), int(stop), QUERIES)
    ]
    return np.array(found, np.int32)
