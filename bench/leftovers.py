"""What an engine has at a moment, and what it leaves behind: processes, objects of Ray's stores."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

import psutil

from raygraft.actors import cluster

SETTLE_SECONDS = 20.0
"""How long what is not needed any more may take to go."""
T = TypeVar("T")


def devices() -> list[psutil.Process]:
    """The processes of device actors that live."""
    return [process for process in _below() if "ray::RayDevice" in _command(process)]


def processes() -> list[str]:
    """All processes below this one, by their commands."""
    return [f"{process.pid} {_command(process)[:80]}" for process in _below()]


def stored_objects() -> int:
    """How many objects the stores of all nodes hold.

    Ray's own sum asks any node, and fails when that one is gone and Ray has not noticed.
    """
    from ray._private.internal_api import node_stats  # noqa: PLC0415

    living = [node for node in cluster.nodes() if cluster.is_there(node)]
    said = [node_stats(node.address, node.port, include_memory_info=False) for node in living]
    return sum(stats.store_stats.num_local_objects for stats in said)


def counted() -> dict[str, int]:
    """What may not grow: objects of the stores, and actors."""
    return {"objects": stored_objects(), "actors": len(devices())}


def settled(look: Callable[[], T], expected: T) -> T:
    """What is there when it is as expected, or has had its time to become so."""
    deadline = time.monotonic() + SETTLE_SECONDS
    while (found := look()) != expected and time.monotonic() < deadline:
        gc.collect()
        time.sleep(0.5)
    return found


def _below() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
