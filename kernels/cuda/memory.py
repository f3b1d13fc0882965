"""Buffers: arenas shared by all subgraphs of a device, and where each value lies in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from raygraft.kernels.cuda.gpu import Gpu


class Arena:
    """Numbered slots of memory. A slot grows when more is asked of it; its address then changes,
    and with it `version`: what was captured with the old one is void."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self._slots: dict[object, Any] = {}
        self.version = 0

    def room(self, slot: object, size: int, what: str) -> int:
        """The address of a slot of at least `size` bytes."""
        found = self._slots.get(slot)
        if found is None or found.nbytes < size:
            if found is not None:
                self._gpu.stream.synchronize()
                del self._slots[slot], found
            self._slots[slot] = self._gpu.allocate(what, (-(-size // 512) * 512,), "uint8")
            self.version += 1
        return int(self._slots[slot].data.ptr)

    def forget(self, owner: object) -> None:
        """Free the slots that were one owner's own; their names begin with it."""
        for slot in [*self._slots]:
            if isinstance(slot, tuple) and slot[0] is owner:
                self._slots.pop(slot, None)


def assign_slots(order: Sequence[tuple[frozenset[str], frozenset[str]]]) -> dict[str, int]:
    """Value -> slot; a slot serves again once its value is read for the last time.

    `order` holds what each launch reads and writes. No launch writes a slot that it reads.
    """
    last = {name: n for n, (read, _) in enumerate(order) for name in read}
    slots: dict[str, int] = {}
    free: list[int] = []
    count = 0
    for number, (read, written) in enumerate(order):
        for name in sorted(written):
            if free:
                slots[name] = free.pop()
            else:
                slots[name], count = count, count + 1
        done = {n for n in read | written if n in slots and last.get(n, number) == number}
        free = sorted({*free, *(slots[name] for name in done)}, reverse=True)
    return slots
