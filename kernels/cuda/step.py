"""What kernels read of a step: tokens, positions, tables, brought to the GPU in one copy."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from raygraft.graph.step import Step
from raygraft.kernels.cuda.buffers import FEW
from raygraft.kernels.cuda.gpu import Gpu
from raygraft.kernels.cuda.sampled_rows import ROW, Wanted, describe

_ROW_WORDS = ROW.itemsize // 4
_NOTHING: np.ndarray[Any, np.dtype[Any]] = np.zeros(0, np.int32)
QUERIES = 64
"""Rows of a block of `prompt_attention.cu`."""


@dataclass(frozen=True, slots=True)
class StepAddresses:
    """Where the parts of a step lie on the GPU; `stride` is the length of a block table.

    `sampling` and `lists` are what `sampled_rows.describe` yields.
    """

    tokens: int
    positions: int
    sequence: int
    wanted: int
    tiles: int
    sampling: int
    tables: int
    lists: int
    stride: int


class DeviceStep:
    """The step that a device is at. All its subgraphs share it."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._step: Step | None = None
        self._rows = self._sequences = self._stride = self._lists = 0
        self._staging: deque[Any] = deque()
        """Two, in turns: one is copied from while the next step is written to the other."""
        self._room: Any = None
        self.sampled = False
        """Whether a subgraph samples."""
        self.version = 0
        self.tile_count = 0
        """Blocks of the prompt attention."""
        self.addresses = StepAddresses(0, 0, 0, 0, 0, 0, 0, 0, 0)

    def upload(self, step: Step) -> None:
        """Bring a step to the GPU, once for all subgraphs. Of those before, one may not be done."""
        if step is self._step:
            return
        sequences, width = step.block_tables.shape
        drawn = self.sampled and Wanted.of(step.sampling).drawn
        sampled, lists = describe(step.sampling) if drawn else (_NOTHING, _NOTHING)
        self._ensure(step.rows, sequences, width, len(lists))
        self._staging.rotate()
        rows, staging = self._rows, self._staging[0]
        tiles = _tiles(step) if step.rows > FEW else np.zeros((0, 3), np.int32)
        parts = (step.tokens, step.positions, step.sequence, step.logit_rows, tiles.reshape(-1))
        for number, values in enumerate(parts):
            staging[number * rows : number * rows + len(values)] = values
        words = sampled.view(np.int32)
        staging[7 * rows : 7 * rows + len(words)] = words
        first = (7 + _ROW_WORDS) * rows
        used = first + self._sequences * self._stride + len(lists)
        staging[used - len(lists) : used] = lists
        tables = staging[first : first + self._sequences * self._stride]
        tables.reshape(-1, self._stride)[:sequences, :width] = step.block_tables
        if not len(lists):
            used = first + sequences * self._stride
        runtime = self._gpu.cupy.cuda.runtime
        runtime.memcpyAsync(
            self.addresses.tokens, staging.ctypes.data, 4 * used, runtime.memcpyHostToDevice,
            self._gpu.stream.ptr,
        )  # fmt: skip
        self.tile_count = len(tiles)
        self._step = step

    def _ensure(self, rows: int, sequences: int, width: int, lists: int) -> None:
        enough = width <= self._stride and lists <= self._lists
        if rows <= self._rows and sequences <= self._sequences and enough:
            return
        self._rows = max(self._rows, FEW, 1 << (rows - 1).bit_length())  # rows of ROW are aligned
        self._sequences = max(self._sequences, 1 << (sequences - 1).bit_length())
        self._stride = max(self._stride, 64, 1 << max(0, width - 1).bit_length())
        self._lists = max(self._lists, 256, 1 << max(0, lists - 1).bit_length())
        tables = (7 + _ROW_WORDS) * self._rows
        size = tables + self._sequences * self._stride + self._lists
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
            sampling=first + 7 * part,
            tables=first + 4 * tables,
            lists=first + 4 * (size - self._lists),
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
