"""The Ray actor that holds one device.

The resident loop, arriving records and leaving results each have a concurrency group, so that
none of them waits for another. Everything else only reads, or happens before the loop starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray

from raygraft.actors.links import (
    Inbox,
    ObjectReceiver,
    ObjectSender,
    Outbox,
    Receiver,
    RingReceiver,
    RingSender,
    Sender,
    allocate_ring,
)
from raygraft.actors.links.object import await_reply
from raygraft.actors.part import Answers, Links, Part, Questions
from raygraft.actors.records import Record
from raygraft.actors.worker import Counters, DeviceWorker
from raygraft.graph.gguf_file import FileIdentity, MappedWeights, local_identity
from raygraft.graph.tensors import (
    QuantizedTensor,
    TensorInfo,
    WeightSlice,
    WeightSource,
    take_slice,
)
from raygraft.kernels.base import BackendOptions, Description
from raygraft.kernels.verification.checks import CheckResult
from raygraft.kernels.verification.trial import Trial
from raygraft.placement.devices import ENGINE


@dataclass(frozen=True, slots=True)
class RingEnd:
    """One end of a ring: its memory, as a reference in a list so that it is not resolved early."""

    memory: list[Any]
    slots: int
    slot_bytes: int

    def sender(self, name: str) -> RingSender:
        return RingSender(ray.get(self.memory[0]), self.slots, self.slot_bytes, name)

    def receiver(self, name: str) -> RingReceiver:
        return RingReceiver(ray.get(self.memory[0]), self.slots, self.slot_bytes, name)


def new_ring(slots: int, slot_bytes: int) -> RingEnd:
    """A ring in the object store of this process's node."""
    reference, _ = allocate_ring(slots, slot_bytes)
    return RingEnd([reference], slots, slot_bytes)


@dataclass(frozen=True, slots=True)
class ActorEnd:
    """The far end of an object link: the actor that records are delivered to."""

    actor: Any

    def sender(self, name: str) -> ObjectSender:
        return ObjectSender(name, self.actor.deliver.remote, await_reply(name))


class StoredWeights:
    """Weight slices that came through the object store (a `WeightSource`)."""

    def __init__(self, tensors: Mapping[str, TensorInfo], stored: Mapping[str, Any]) -> None:
        self._tensors = tensors
        self._stored = stored

    def read(self, weight: WeightSlice) -> QuantizedTensor:
        """The raw bytes of a slice, as a view of the object store."""
        return take_slice(
            ray.get(self._stored[weight.tensor]), self._tensors[weight.tensor], weight
        )


def _weights(
    tensors: Mapping[str, TensorInfo],
    files: tuple[FileIdentity, ...] | None,
    stored: Mapping[str, Any],
) -> WeightSource:
    return MappedWeights(files, tensors) if files else StoredWeights(tensors, stored)


def link_name(source: str, target: str) -> str:
    """The name of the link between two devices, or the engine."""
    return f"{source} to {target}"


@ray.remote(num_cpus=0, concurrency_groups={"loop": 1, "arrivals": 1, "results": 1})
class RayDevice:
    """A `DeviceWorker` in an actor. Call `start` first."""

    _worker: DeviceWorker

    def __init__(self, name: str) -> None:
        self._name = name
        self._inbox = Inbox()
        self._outbox = Outbox(link_name(name, ENGINE))
        self._receivers: dict[str, Receiver] = {}
        self._senders: dict[str, Sender] = {}

    def start(self, backend: str, options: BackendOptions) -> None:
        """Make the backend. Ray hands on what a call raises, but not what a constructor does."""
        self._worker = DeviceWorker(self._name, backend, options)

    def describe(self) -> Description:
        """What the device is, as it is now."""
        return self._worker.describe()

    def answer(self, questions: Questions) -> Answers:
        """Answer all questions of a model at once."""
        return self._worker.answer(questions)

    def has_files(self, files: tuple[FileIdentity, ...]) -> bool:
        """Whether this machine has the same model files at the same paths."""
        return all(file.same_file(local_identity(file)) for file in files)

    def load(
        self, part: Part, files: tuple[FileIdentity, ...] | None, stored: Mapping[str, Any]
    ) -> None:
        """Load a part of a plan, from the files on this machine or from the object store."""
        self._worker.load(part, _weights(part.tensors, files, stored))

    def check(
        self, trial: Trial, files: tuple[FileIdentity, ...] | None, stored: Mapping[str, Any]
    ) -> CheckResult:
        """Run one check, with weights as in `load`."""
        return self._worker.check(trial, _weights(trial.check.tensors, files, stored))

    def open_rings(self, sizes: Mapping[str, tuple[int, int]]) -> dict[str, RingEnd]:
        """Make a ring for each source: (slots, bytes of a slot). Returns their other ends."""
        rings = {source: new_ring(*size) for source, size in sizes.items()}
        for source, ring in rings.items():
            self._receivers[source] = ring.receiver(link_name(source, self._name))
        return rings

    def open_inbox(self, sources: tuple[str, ...]) -> None:
        """Expect records of these sources by `deliver`."""
        for source in sources:
            self._receivers[source] = ObjectReceiver(link_name(source, self._name), self._inbox)

    def connect(self, ends: Mapping[str, RingEnd | ActorEnd | None]) -> None:
        """Take the other ends of the links to each target; None is the engine's outbox."""
        for target, end in ends.items():
            name = link_name(self._name, target)
            self._senders[target] = self._outbox if end is None else end.sender(name)

    @ray.method(concurrency_group="loop")
    def run(self) -> None:
        """The resident loop: returns when it is shut down, fails when the device fails."""
        control = self._receivers[ENGINE]
        receivers = {name: end for name, end in self._receivers.items() if name != ENGINE}
        self._worker.run(Links(control, receivers, self._senders))

    @ray.method(concurrency_group="arrivals")
    def deliver(self, link: str, sequence: int, record: Record) -> None:
        """A record of another node arrives."""
        self._inbox.put(link, sequence, record)

    @ray.method(concurrency_group="results")
    def take(self, timeout: float) -> tuple[Record, ...]:
        """Results for an engine on another node."""
        return self._outbox.take(timeout)

    def counters(self) -> Counters:
        """What the device has done so far."""
        return self._worker.counters


def raw_tensor(weights: MappedWeights, tensor: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a whole tensor, as they go into the object store."""
    return weights.read(WeightSlice(tensor)).data.reshape(-1)
