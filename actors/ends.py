"""Both ends of the links between Ray actors: the one that opens, and the one that is handed over.

The receiver opens a link on its own node; what comes back to the engine travels to the actor that
sends, and becomes its end there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import ray

from raygraft.actors.links import (
    Inbox,
    ObjectReceiver,
    ObjectSender,
    Receiver,
    RingReceiver,
    RingSender,
    TcpReceiver,
    TcpSender,
    allocate_ring,
)
from raygraft.actors.links.object import await_reply
from raygraft.placement.costs import DIRECT, NCCL, PINNED

_INSTEAD = {DIRECT: PINNED, PINNED: "ring", NCCL: "tcp"}


@dataclass(frozen=True, slots=True)
class Opening:
    """What the receiver has to know to open a link."""

    link: str
    """ "ring", "cuda_ipc", "cuda_host", "nccl", "tcp" or "object"."""
    slots: int
    record_bytes: int
    """The largest record."""
    epoch: int = 0
    secret: bytes = field(default=b"", repr=False)
    """Of a tcp link, or one that may become it: who holds it may send."""

    @property
    def instead(self) -> Opening:
        """What to open where this cannot be reached."""
        return replace(self, link=_INSTEAD.get(self.link, "object"))


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


@dataclass(frozen=True, slots=True)
class TcpEnd:
    """The far end of a tcp link: where its receiver listens, and the secret."""

    address: tuple[str, int]
    opening: Opening

    def sender(self, name: str) -> TcpSender:
        """Connect. Raises LinkError when that fails."""
        opening = self.opening
        return TcpSender(name, self.address, opening.secret, opening.record_bytes, opening.slots)


@dataclass(frozen=True, slots=True)
class DeviceEnd:
    """The far end of a ring in a device's memory: what another device joins it with."""

    opened: Any


@dataclass(frozen=True, slots=True)
class ActorEnd:
    """The far end of an object link: the actor that records are delivered to."""

    actor: Any
    epoch: int

    def sender(self, name: str) -> ObjectSender:
        name = _name_in(self.epoch, name)
        return ObjectSender(name, self.actor.deliver.remote, await_reply(name))


End = RingEnd | TcpEnd | ActorEnd
"""What makes a sender."""


def open_ring(opening: Opening, name: str) -> tuple[Receiver, RingEnd]:
    """A ring in the object store of this process's node."""
    reference, _ = allocate_ring(opening.slots, opening.record_bytes)
    end = RingEnd([reference], opening.slots, opening.record_bytes)
    return end.receiver(name), end


def open_tcp(opening: Opening, name: str) -> tuple[Receiver, TcpEnd]:
    """Listen on this process's node."""
    address = ray.util.get_node_ip_address()
    receiver = TcpReceiver(name, address, opening.secret, opening.record_bytes)
    return receiver, TcpEnd(receiver.address, opening)


def open_link(opening: Opening, name: str, inbox: Inbox) -> tuple[Receiver, End | None]:
    """The receiving end of an actor, and what its sender needs: None for the actor's own handle.

    Raises LinkError.
    """
    if opening.link == "ring":
        return open_ring(opening, name)
    if opening.link == "tcp":
        return open_tcp(opening, name)
    return ObjectReceiver(_name_in(opening.epoch, name), inbox), None


def _name_in(epoch: int, name: str) -> str:
    """A record of an object link may arrive after the link: its name is never used again."""
    return f"{name} in epoch {epoch}"


def link_name(source: str, target: str) -> str:
    """The name of the link between two devices, or the engine."""
    return f"{source} to {target}"
