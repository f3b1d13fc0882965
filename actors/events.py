"""What happened to an engine, in order: log records of the logger `raygraft.actors.events`.

Each has `event`, `epoch` and `request` (a number, or None) as attributes, for handlers that write
JSON or pick what they want. All are of level INFO or DEBUG: who wants them turns them on.
"""

from __future__ import annotations

import logging

LOGGER = logging.getLogger(__name__)
LOGGER.addHandler(logging.NullHandler())


def tell(event: str, message: str, *, epoch: int, request: int | None = None) -> None:
    """Log what happened: `event` is a word to look for, `message` is for people."""
    level = logging.INFO if request is None else logging.DEBUG
    if LOGGER.isEnabledFor(level):
        fields = {"event": event, "epoch": epoch, "request": request}
        LOGGER.log(level, message, extra=fields)
