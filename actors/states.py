"""Caches that follow their regions to other devices."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import ray

from raygraft.actors.journeys import Journeys
from raygraft.actors.ray_actors import RayActors


class StatesOnTheMove:
    """Pages of caches that go from device to device, by way of the object store.

    They leave when this is made, before the devices load what replaces them.
    """

    def __init__(self, actors: RayActors, journeys: Journeys, pages: Sequence[int] | None) -> None:
        """`pages` are those that hold something; None gives all up."""
        self._actors = actors
        self._arriving = journeys.arriving
        self._pages = pages
        began = time.monotonic()
        self._left: list[Any] = [
            actors[actor].export_states.remote(names, pages)
            for actor, names in journeys.leaving.items()
            if actor in actors
        ]
        ray.wait(self._left, num_returns=max(1, len(self._left)))
        self.seconds = time.monotonic() - began
        """What copying has taken."""
        self.nbytes = 0
        """What was copied."""

    def arrive(self) -> bool:
        """Fill the new places; whether all that was held is there."""
        if self._pages is None:
            return False
        began = time.monotonic()
        calls = {
            actor: self._actors[actor].import_states.remote(names, self._pages, *self._left)
            for actor, names in self._arriving.items()
        }
        copied = self._actors.ask(calls).values()
        self.nbytes = sum(nbytes or 0 for nbytes in copied)
        self.seconds += time.monotonic() - began
        return None not in copied
