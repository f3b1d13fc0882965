"""The Ray actor that holds one device.

The resident loop, arriving records, leaving results and signs of life each have a concurrency
group, so that none of them waits for another. Everything else only reads, or happens before the
loop starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import ray

from raygraft.actors.ends import End, Opening, link_name, open_link
from raygraft.actors.links import Inbox, Outbox, Receiver, Sender
from raygraft.actors.part import Answers, Links, Part, Questions
from raygraft.actors.records import Array, Record
from raygraft.actors.trace import Recorded, clock
from raygraft.actors.worker import Counters, DeviceWorker
from raygraft.graph.errors import LinkError
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


@ray.remote(num_cpus=0, concurrency_groups={"loop": 1, "arrivals": 1, "results": 1, "health": 1})
class RayDevice:
    """A `DeviceWorker` in an actor. Call `start` first."""

    _worker: DeviceWorker

    def __init__(self, name: str) -> None:
        self._name = name
        self._inbox = Inbox()
        self._outbox = Outbox(link_name(name, ENGINE))
        self._epoch = 0
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

    def prepare(
        self, part: Part, files: tuple[FileIdentity, ...] | None, stored: Mapping[str, Any]
    ) -> None:
        """As `load`, beside the part that runs; what cannot be done is left to `load`."""
        self._worker.prepare(part, _weights(part.tensors, files, stored))

    def export_states(
        self, names: Sequence[str], pages: Sequence[int]
    ) -> tuple[str, dict[str, tuple[Array, ...] | None]]:
        """The backend's name, and what `DeviceWorker.export_states` says."""
        return self._worker.backend_name, self._worker.export_states(names, pages)

    def import_states(
        self,
        names: Sequence[str],
        pages: Sequence[int],
        *exported: tuple[str, Mapping[str, Any]],
    ) -> bool:
        """Fill caches; whether all of them were there to be filled with."""
        backend = self._worker.backend_name
        alike = [own for of, own in exported if of == backend]
        states = {name: own[name] for own in alike for name in own if name in names}
        if len(states) < len(names) or None in states.values():
            return False
        self._worker.import_states(states, pages)
        return True

    def check(
        self, trial: Trial, files: tuple[FileIdentity, ...] | None, stored: Mapping[str, Any]
    ) -> CheckResult:
        """Run one check, with weights as in `load`."""
        return self._worker.check(trial, _weights(trial.check.tensors, files, stored))

    def open_links(self, openings: Mapping[str, Opening]) -> dict[str, End | None]:
        """Open the receiving end of the link from each source; what the sources need for theirs."""
        ends: dict[str, End | None] = {}
        for source, opening in openings.items():
            if source in self._receivers:
                self._receivers[source].close()
            name = link_name(source, self._name)
            self._epoch = opening.epoch
            self._receivers[source], ends[source] = open_link(opening, name, self._inbox)
        return ends

    def connect(self, ends: Mapping[str, End | None]) -> dict[str, str]:
        """Take the other ends of the links to each target; None is the engine's outbox.

        Returns the targets that cannot be reached, and why.
        """
        unreached = {}
        for target, end in ends.items():
            try:
                name = link_name(self._name, target)
                self._senders[target] = self._outbox if end is None else end.sender(name)
            except LinkError as error:
                unreached[target] = str(error)
        return unreached

    @ray.method(concurrency_group="loop")
    def run(self) -> None:
        """The resident loop: returns when it is shut down, fails when the device fails."""
        control = self._receivers[ENGINE]
        receivers = {name: end for name, end in self._receivers.items() if name != ENGINE}
        self._worker.run(Links(control, receivers, self._senders))

    @ray.method(concurrency_group="health")
    def ping(self) -> None:
        """A sign of life, whatever else the actor does."""

    def pid(self) -> int:
        """Its process, on its own machine."""
        return os.getpid()

    def stop(self) -> None:
        """Make the resident loop return soon."""
        self._worker.stop()

    def close_links(self) -> None:
        """Let go of all links, after the loop has ended."""
        ends: list[Receiver | Sender] = [*self._receivers.values(), *self._senders.values()]
        self._outbox.close()
        for end in ends:
            end.close()
        self._receivers.clear()
        self._senders.clear()
        self._inbox, self._outbox = Inbox(), Outbox(link_name(self._name, ENGINE))

    @ray.method(concurrency_group="arrivals")
    def deliver(self, link: str, sequence: int, record: Record) -> None:
        """A record of another node arrives."""
        self._inbox.put(link, sequence, record)

    @ray.method(concurrency_group="results")
    def take(self, epoch: int, timeout: float) -> tuple[Record, ...]:
        """Results for an engine on another node. A call of an earlier epoch gets none."""
        return self._outbox.take(timeout) if epoch == self._epoch else ()

    def counters(self) -> Counters:
        """What the device has done so far."""
        return self._worker.counters

    def clock(self) -> tuple[str, float]:
        """See `raygraft.actors.trace.clock`."""
        return clock()

    def start_trace(self) -> None:
        """Record events from now on."""
        self._worker.trace.start()

    def recorded(self) -> Recorded:
        """The events since then."""
        return self._worker.trace.recorded()


def raw_tensor(weights: MappedWeights, tensor: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a whole tensor, as they go into the object store."""
    return weights.read(WeightSlice(tensor)).data.reshape(-1)
