"""What a link must do: one end sends records, the other receives them in the same order.

Whoever waits passes a short timeout (50 to 200 ms) in a loop and looks in between whether to go
on waiting; a record that is there is handed over at once, whatever the timeout.
"""

from __future__ import annotations

from typing import Protocol

from raygraft.actors.records import Record


class Sender(Protocol):
    """The end of a link that records go into. One thread at a time uses it."""

    def send(self, record: Record, timeout: float) -> None:
        """Hand a record over; its tensors may be overwritten as soon as this returns.

        Waits at most `timeout` seconds for room and then raises LinkFullError, which names the
        link: the one error after which to try again. Raises LinkError when the record can never
        go, as it is larger than the link's slots or the link is closed.
        """
        ...

    def close(self) -> None:
        """Let go of the link's memory. Closing twice is allowed."""
        ...


class Receiver(Protocol):
    """The end of a link that records come out of. One thread at a time uses it."""

    def receive(self, timeout: float) -> Record | None:
        """The next record, whose tensors are the caller's own; None after `timeout` seconds.

        Raises LinkError after `close`.
        """
        ...

    def close(self) -> None:
        """Let go of the link's memory. Closing twice is allowed."""
        ...
