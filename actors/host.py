"""What an actor holds: its devices, and the loop that takes their turns.

It knows nothing of Ray. A Ray actor, or a thread, holds one and gives it its links.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from raygraft.actors.journeys import NOTHING_STAYS, Staying
from raygraft.actors.loop import ResidentLoop
from raygraft.actors.part import ActorPart, Links
from raygraft.actors.sharing import gpu_of
from raygraft.actors.worker import DeviceWorker
from raygraft.graph.tensors import WeightSource
from raygraft.kernels.base import Array, Backend, BackendOptions, Commons, DeviceRing
from raygraft.placement.devices import DeviceSpec

Exported = tuple[str, Mapping[str, tuple[Array, ...] | None]]
"""A backend's name, and what `DeviceWorker.export_states` says."""


class Host(Mapping[str, DeviceWorker]):
    """The devices of one actor."""

    def __init__(self) -> None:
        self._workers: dict[str, DeviceWorker] = {}
        self._commons = Commons()
        self._stopping = threading.Event()
        self._part: ActorPart | None = None
        self.prepared: ActorPart | None = None
        """What was prepared last."""

    def __getitem__(self, name: str) -> DeviceWorker:
        return self._workers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._workers)

    def __len__(self) -> int:
        return len(self._workers)

    def add(self, spec: DeviceSpec) -> None:
        """Make a device's backend, in the place of an earlier one. Raises ConfigurationError."""
        options = BackendOptions(spec.threads or 1, gpu_of(spec) or 0, self._commons)
        self._workers.pop(spec.name, None)
        self._workers[spec.name] = DeviceWorker(spec.name, spec.backend, options)

    def remove(self, name: str) -> None:
        """Let go of a device, and of all that it holds."""
        del self._workers[name]

    def load(
        self, part: ActorPart, weights: WeightSource, staying: Staying = NOTHING_STAYS
    ) -> bool:
        """Load the devices' parts, when all of them have let go of what they need no more.

        Returns whether all is in their caches that is `staying`. Raises what `DeviceWorker.load`
        raises.
        """
        self._stopping.clear()
        self._part = part
        for name, worker in self._workers.items():
            own_states = staying.names.get(name, ())
            worker.make_room(part.parts.get(name), own_states, staying.pages)
        kept = True
        for name, own in part.parts.items():
            kept &= self._workers[name].load(own, weights)
            self._workers[name].backend.interrupt(False)
        return kept

    def prepare(self, part: ActorPart, weights: WeightSource) -> None:
        """As `load`, beside the parts that run; what cannot be done is left to `load`."""
        self.prepared = part
        for name, own in part.parts.items():
            self._workers[name].prepare(own, weights)

    def export_states(self, names: Sequence[str], pages: Sequence[int]) -> tuple[Exported, ...]:
        """What pages of these attention operators' caches hold, by device."""
        return tuple(
            (worker.backend_name, worker.export_states(names, pages))
            for worker in self._workers.values()
        )

    def import_states(
        self, wanted: Mapping[str, Sequence[str]], pages: Sequence[int], found: Sequence[Exported]
    ) -> int | None:
        """Fill caches with what other devices had: so many bytes; None when some is not there."""
        nbytes = 0
        for device, names in wanted.items():
            worker = self._workers[device]
            alike = [own for backend, own in found if backend == worker.backend_name]
            states: dict[str, Any] = {n: own[n] for own in alike for n in own if n in names}
            if len(states) < len(names) or None in states.values():
                return None
            worker.import_states(states, pages)
            nbytes += sum(array.nbytes for content in states.values() for array in content)
        return nbytes

    def open_ring(self, slots: int, slot_bytes: int, link: str) -> tuple[DeviceRing, Any]:
        """See `Backend.open_ring`: of the memory that all devices here share."""
        return self._any_backend.open_ring(slots, slot_bytes, link)

    def join_ring(self, opened: Any) -> DeviceRing:
        """See `Backend.join_ring`."""
        return self._any_backend.join_ring(opened)

    @property
    def _any_backend(self) -> Backend:
        return next(iter(self._workers.values())).backend

    def stop(self) -> None:
        """Make the loop return soon, whatever it waits for."""
        self._stopping.set()
        for worker in [*self._workers.values()]:
            worker.backend.interrupt(True)

    def run(self, links: Links) -> None:
        """The resident loop, until shut down. See `ResidentLoop.run`."""
        assert self._part is not None
        ResidentLoop(self._part, self._workers, links).run(self._stopping)
