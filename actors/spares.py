"""Processes that wait to become actors: all is imported and kernels are loaded, but no weights.

Most of what a new actor takes is the start of its process. A spare has that behind it, at the price
of the memory that an actor without a model takes.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from raygraft.actors import cluster
from raygraft.actors.cluster import Node
from raygraft.actors.ray_device import RayDevice
from raygraft.placement.devices import DeviceSpec

CALM_SECONDS = 2.0
"""How long after a start new spares begin: first those that wait for tokens have the machine."""
ANSWER_SECONDS = 0.5


class Spares:
    """So many spare actors on each node that has devices."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._ready: dict[str, list[tuple[Any, Any]]] = {}
        """Node id -> actors, each with the call that warms it."""
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None
        self._closed = False

    @property
    def actors(self) -> list[Any]:
        """Those that stand by, warm or not."""
        with self._lock:
            return [actor for waiting in self._ready.values() for actor, _ in waiting]

    def take(self, node: Node, name: str) -> Any | None:
        """A spare of this node that lives, from now on the actor of this name; None without one."""
        while True:
            with self._lock:
                waiting = self._ready.get(node.id)
                if not waiting:
                    return None
                actor, _ = waiting.pop(0)
            try:
                ray.get(actor.ping.remote(), timeout=ANSWER_SECONDS)
            except (RayError, GetTimeoutError):
                ray.kill(actor)
                continue
            actor.rename.remote(name)
            return actor

    def refill_soon(self, nodes: Mapping[str, Node], specs: Mapping[str, DeviceSpec]) -> None:
        """Have as many as there should be, on the nodes of these devices, a little later."""
        with self._lock:
            if self._timer is not None:
                self._timer.cancel()
            if not self._count or self._closed:
                return
            arguments = (dict(nodes), dict(specs))
            self._timer = threading.Timer(CALM_SECONDS, self._refill, arguments)
            self._timer.daemon = True
            self._timer.start()

    def close(self) -> None:
        """End all of them."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()
            for waiting in self._ready.values():
                for actor, _ in waiting:
                    ray.kill(actor)
            self._ready.clear()

    def _refill(self, nodes: Mapping[str, Node], specs: Mapping[str, DeviceSpec]) -> None:
        backends: dict[str, set[str]] = {}
        for name, node in nodes.items():
            backends.setdefault(node.id, set()).add(specs[name].backend)
        with self._lock:
            if self._closed:
                return
            for node in {node.id: node for node in nodes.values()}.values():
                waiting = [pair for pair in self._ready.get(node.id, ()) if _lives(*pair)]
                while len(waiting) < self._count:
                    options = {"scheduling_strategy": cluster.pinned_to(node)}
                    actor = RayDevice.options(**options).remote("")  # type: ignore[attr-defined]
                    waiting.append((actor, actor.warm_up.remote(sorted(backends[node.id]))))
                self._ready[node.id] = waiting


def _lives(actor: Any, warming: Any) -> bool:
    """Whether a spare is warm and answers, or is still starting."""
    try:
        if ray.wait([warming], timeout=0)[0]:
            ray.get(warming)
            ray.get(actor.ping.remote(), timeout=ANSWER_SECONDS)
    except (RayError, GetTimeoutError):
        ray.kill(actor)
        return False
    return True
