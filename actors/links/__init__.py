"""Links: how a record gets from one actor to the next. One file for each kind.

| file | reaches | how |
|---|---|---|
| `ring.py` | actors of one node | slots in the object store's shared memory |
| `object.py` | any node, and the driver | actor methods, order restored by sequence numbers |
| `local.py` | one process | a queue, for tests and trials |

`base.py` says what both ends of every link must do.
"""

from raygraft.actors.links.base import Receiver, Sender
from raygraft.actors.links.local import LocalReceiver, LocalSender, local_link
from raygraft.actors.links.object import (
    Inbox,
    ObjectReceiver,
    ObjectSender,
    Outbox,
    PulledReceiver,
)
from raygraft.actors.links.ring import (
    RingReceiver,
    RingSender,
    allocate_ring,
    format_ring,
    ring_bytes,
)

__all__ = [
    "Inbox",
    "LocalReceiver",
    "LocalSender",
    "ObjectReceiver",
    "ObjectSender",
    "Outbox",
    "PulledReceiver",
    "Receiver",
    "RingReceiver",
    "RingSender",
    "Sender",
    "allocate_ring",
    "format_ring",
    "local_link",
    "ring_bytes",
]
