"""Caches that follow their regions to other devices."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import ray

from raygraft.actors.part import ActorPart
from raygraft.actors.ray_actors import RayActors


class StatesOnTheMove:
    """Pages of caches between the loops of one plan and those of the next.

    They leave when this is made, before the devices load what replaces them. A device whose part
    stays as it is keeps its caches where they are.
    """

    def __init__(
        self,
        actors: RayActors,
        before: Mapping[str, ActorPart],
        after: Mapping[str, ActorPart],
        pages: Sequence[int] | None,
    ) -> None:
        """Parts are by actor. `pages` are those that hold something; None gives all up."""
        self._actors = actors
        self._pages = pages
        self._wanted: dict[str, dict[str, tuple[str, ...]]] = {}
        """Actor -> its devices with other states than before -> those states."""
        self._left: list[Any] = []
        self.seconds = 0.0
        """What copying has taken."""
        if not pages:
            return
        began = time.monotonic()
        loaded = {name: own for part in before.values() for name, own in part.parts.items()}
        for actor, part in after.items():
            changed = {n: own.states for n, own in part.parts.items() if loaded.get(n) != own}
            self._wanted[actor] = {name: states for name, states in changed.items() if states}
        names = {s for wanted in self._wanted.values() for own in wanted.values() for s in own}
        for actor, part in before.items():
            held = {state for own in part.parts.values() for state in own.states}
            leaving = sorted(held & names)
            if leaving and actor in actors:
                self._left.append(actors[actor].export_states.remote(leaving, pages))
        ray.wait(self._left, num_returns=max(1, len(self._left)))
        self.seconds += time.monotonic() - began

    def arrive(self) -> bool:
        """Fill the new places; whether all that was held is there."""
        if self._pages is None:
            return False
        began = time.monotonic()
        calls = {
            actor: self._actors[actor].import_states.remote(wanted, self._pages, *self._left)
            for actor, wanted in self._wanted.items()
            if wanted
        }
        complete = all(self._actors.ask(calls).values())
        self.seconds += time.monotonic() - began
        return complete
