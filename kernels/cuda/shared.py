"""What all subgraphs on a GPU use together, those of all devices of an actor."""

from __future__ import annotations

from typing import Any
from weakref import WeakSet

import numpy as np

from raygraft.kernels.cuda.gpu import Gpu
from raygraft.kernels.cuda.memory import Arena
from raygraft.kernels.cuda.step import DeviceStep


class Shared:
    """A GPU, its buffers, the step that it is at, and memory that other processes may map."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.arena = Arena(gpu)
        self.step = DeviceStep(gpu)
        with gpu.device:
            memory = gpu.cupy.cuda.alloc_pinned_memory(4)
        self.stop = np.frombuffer(memory, np.int32, 1)
        """Read by kernels that wait for another GPU: not 0 when they shall give up."""
        self.stop[0] = 0
        self.far_links: WeakSet[Any] = WeakSet()
        """Those over NCCL, whose waits end only when they are told to."""
        self._given_back: dict[int, list[Any]] = {}

    @property
    def version(self) -> tuple[int, int]:
        """Changes when an address does; graphs captured before are void."""
        return self.arena.version, self.step.version

    def exported(self, size: int) -> Any:
        """An allocation of its own, as CUDA shares only whole ones; with anything in it.

        None is ever freed: a process that has mapped one may live longer than its use here.
        """
        if self._given_back.get(size):
            return self._given_back[size].pop()
        return self.gpu.cupy.cuda.Memory(size)

    def give_back(self, memory: Any) -> None:
        """Keep what `exported` gave for the next who asks for as much."""
        self._given_back.setdefault(memory.size, []).append(memory)
