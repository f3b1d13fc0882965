"""Links: how a record gets from one actor to the next. One file for each kind.

| file | reaches | how |
|---|---|---|
| `ring.py` | actors of one node | slots in the object store's shared memory |
| `tcp.py` | actors of other nodes | a TCP connection each, sealed (`sealing.py`) |
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
from raygraft.actors.links.sealing import new_secret
from raygraft.actors.links.tcp import TcpReceiver, TcpSender

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
    "TcpReceiver",
    "TcpSender",
    "allocate_ring",
    "format_ring",
    "local_link",
    "new_secret",
    "ring_bytes",
]
