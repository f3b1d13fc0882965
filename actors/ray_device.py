"""The Ray actor that holds one device, or several that share hardware.

The resident loop, arriving records, leaving results and signs of life each have a concurrency
group, so that none of them waits for another. Everything else only reads, or happens before the
loop starts.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import ray

from raygraft.actors.ends import DeviceEnd, End, Opening, link_name, open_link
from raygraft.actors.host import Exported, Host
from raygraft.actors.journeys import Staying
from raygraft.actors.links import Inbox, Outbox, Receiver, Sender
from raygraft.actors.part import ActorPart, Answers, Links, Questions
from raygraft.actors.records import Record
from raygraft.actors.trace import Recorded, clock
from raygraft.actors.worker import Counters
from raygraft.graph.errors import LinkError
from raygraft.graph.gguf_file import FileIdentity, MappedWeights, local_identity
from raygraft.graph.tensors import (
    QuantizedTensor,
    TensorInfo,
    WeightSlice,
    WeightSource,
    take_slice,
)
from raygraft.kernels import find_backend
from raygraft.kernels.base import Description, DeviceRing
from raygraft.kernels.compile_cache import doing
from raygraft.kernels.verification.checks import CheckResult
from raygraft.kernels.verification.trial import Trial
from raygraft.placement.costs import BY_DEVICES
from raygraft.placement.devices import ENGINE, DeviceSpec


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
    """A `Host` in an actor. Call `start` first, once for each of its devices."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._host = Host()
        self._inbox = Inbox()
        self._outbox = Outbox(link_name(name, ENGINE))
        self._epoch = 0
        self._receivers: dict[str, Receiver] = {}
        self._senders: dict[str, Sender] = {}
        self._rings_in: dict[str, DeviceRing] = {}
        self._rings_out: dict[str, DeviceRing] = {}

    def warm_up(self, backends: Sequence[str]) -> None:
        """Import what these backends need, and load their kernels."""
        for backend in backends:
            find_backend(backend).warm_up()

    def rename(self, name: str) -> None:
        """A spare becomes the actor of this name."""
        self._name = name
        self._outbox = Outbox(link_name(name, ENGINE))

    def start(self, spec: DeviceSpec) -> None:
        """Make a backend. Ray hands on what a call raises, but not what a constructor does."""
        self._host.add(spec)

    def remove(self, device: str) -> None:
        """Let go of a device."""
        self._host.remove(device)

    def describe(self) -> dict[str, Description]:
        """What each device is, as it is now."""
        return {name: worker.describe() for name, worker in self._host.items()}

    def answer(self, devices: Sequence[str], questions: Questions) -> dict[str, Answers]:
        """Answer all questions of a model at once."""
        return {name: self._host[name].answer(questions) for name in devices}

    def has_files(self, files: tuple[FileIdentity, ...]) -> bool:
        """Whether this machine has the same model files at the same paths."""
        return all(file.same_file(local_identity(file)) for file in files)

    def load(
        self,
        part: ActorPart,
        files: tuple[FileIdentity, ...] | None,
        stored: Mapping[str, Any],
        staying: Staying,
    ) -> bool:
        """Load a part of a plan, from the files on this machine or from the object store.

        Returns what `Host.load` does.
        """
        return self._host.load(part, _weights(part.tensors, files, stored), staying)

    def load_prepared(
        self,
        epoch: int,
        files: tuple[FileIdentity, ...] | None,
        stored: Mapping[str, Any],
        staying: Staying,
    ) -> bool:
        """As `load`, the part that was prepared last: that is here already."""
        assert self._host.prepared is not None
        return self.load(replace(self._host.prepared, epoch=epoch), files, stored, staying)

    def prepare(
        self, part: ActorPart, files: tuple[FileIdentity, ...] | None, stored: Mapping[str, Any]
    ) -> None:
        """As `load`, beside the part that runs; what cannot be done is left to `load`."""
        self._host.prepare(part, _weights(part.tensors, files, stored))

    def export_states(self, names: Sequence[str], pages: Sequence[int]) -> tuple[Exported, ...]:
        """See `Host.export_states`."""
        return self._host.export_states(names, pages)

    def import_states(
        self,
        wanted: Mapping[str, Sequence[str]],
        pages: Sequence[int],
        *found: tuple[Exported, ...],
    ) -> int | None:
        """See `Host.import_states`; there is one of `found` for each actor."""
        every = [exported for of_actor in found for exported in of_actor]
        return self._host.import_states(wanted, pages, every)

    def check(
        self,
        device: str,
        trial: Trial,
        files: tuple[FileIdentity, ...] | None,
        stored: Mapping[str, Any],
    ) -> CheckResult:
        """Run one check on a device, with weights as in `load`."""
        return self._host[device].check(trial, _weights(trial.check.tensors, files, stored))

    def open_links(self, openings: Mapping[str, Opening]) -> dict[str, End | DeviceEnd | None]:
        """Open the receiving end of the link from each source; what the sources need for theirs."""
        ends: dict[str, End | DeviceEnd | None] = {}
        for source, opening in openings.items():
            for earlier in (self._receivers.pop(source, None), self._rings_in.pop(source, None)):
                if earlier is not None:
                    earlier.close()
            name = link_name(source, self._name)
            self._epoch = opening.epoch
            if opening.link in BY_DEVICES:
                size = opening.slots, opening.record_bytes
                self._rings_in[source], opened = self._host.open_ring(*size, opening.link)
                ends[source] = DeviceEnd(opened)
            else:
                self._receivers[source], ends[source] = open_link(opening, name, self._inbox)
        return ends

    def connect(self, ends: Mapping[str, End | DeviceEnd | None]) -> dict[str, str]:
        """Take the other ends of the links to each target; None is the engine's outbox.

        Returns the targets that cannot be reached, and why.
        """
        unreached = {}
        for target, end in ends.items():
            name = link_name(self._name, target)
            self._senders.pop(target, None)
            if target in self._rings_out:
                self._rings_out.pop(target).close()
            try:
                if isinstance(end, DeviceEnd):
                    self._rings_out[target] = self._host.join_ring(end.opened)
                else:
                    self._senders[target] = self._outbox if end is None else end.sender(name)
            except LinkError as error:
                reason = f"link {name}: {error}" if isinstance(end, DeviceEnd) else str(error)
                unreached[target] = reason
        return unreached

    @ray.method(concurrency_group="loop")
    def run(self) -> None:
        """The resident loop: returns when it is shut down, fails when the device fails."""
        control = self._receivers[ENGINE]
        receivers = {name: end for name, end in self._receivers.items() if name != ENGINE}
        links = Links(control, receivers, self._senders, self._rings_in, self._rings_out)
        self._host.run(links)

    @ray.method(concurrency_group="health")
    def ping(self) -> str:
        """A sign of life, whatever else the actor does; and what that is, when it takes long."""
        return doing()

    def pid(self) -> int:
        """Its process, on its own machine."""
        return os.getpid()

    def stop(self) -> None:
        """Make the resident loop return soon."""
        self._host.stop()

    def close_links(self) -> None:
        """Let go of all links, after the loop has ended."""
        groups: tuple[dict[str, Any], ...] = (
            self._receivers, self._senders, self._rings_in, self._rings_out,
        )  # fmt: skip
        self._outbox.close()
        for ends in groups:
            for end in ends.values():
                end.close()
            ends.clear()
        self._inbox, self._outbox = Inbox(), Outbox(link_name(self._name, ENGINE))

    @ray.method(concurrency_group="arrivals")
    def deliver(self, link: str, sequence: int, record: Record) -> None:
        """A record of another node arrives."""
        self._inbox.put(link, sequence, record)

    @ray.method(concurrency_group="results")
    def take(self, epoch: int, timeout: float) -> tuple[Record, ...]:
        """Results for an engine on another node. A call of an earlier epoch gets none."""
        return self._outbox.take(timeout) if epoch == self._epoch else ()

    def counters(self) -> dict[str, Counters]:
        """What each device has done so far."""
        return {name: worker.counters for name, worker in self._host.items()}

    def clock(self) -> tuple[str, float]:
        """See `raygraft.actors.trace.clock`."""
        return clock()

    def start_trace(self) -> None:
        """Record events from now on, of each device."""
        for worker in self._host.values():
            worker.trace.start()

    def recorded(self) -> dict[str, Recorded]:
        """The events since then, of each device."""
        return {name: worker.trace.recorded() for name, worker in self._host.items()}


def raw_tensor(weights: MappedWeights, tensor: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a whole tensor, as they go into the object store."""
    return weights.read(WeightSlice(tensor)).data.reshape(-1)
