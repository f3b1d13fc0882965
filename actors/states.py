"""Caches that follow their regions to other devices."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray

from raygraft.actors.part import Part
from raygraft.actors.ray_actors import RayActors


class StatesOnTheMove:
    """Pages of caches between the loops of one plan and those of the next.

    They leave when this is made, before the devices load what replaces them. A device whose part
    stays as it is keeps its caches where they are.
    """

    def __init__(
        self,
        actors: RayActors,
        before: Mapping[str, Part],
        after: Mapping[str, Part],
        pages: Sequence[int] | None,
    ) -> None:
        """`pages` are those that hold something; None gives all up."""
        self._actors = actors
        self._pages = pages
        self._wanted: dict[str, tuple[str, ...]] = {}
        self._left: list[Any] = []
        if not pages:
            return
        for name, part in after.items():
            was = before.get(name)
            if was is None or replace(was, epoch=part.epoch) != part:
                self._wanted[name] = _states_of(part)
        names = {state for states in self._wanted.values() for state in states}
        for name, part in before.items():
            own = [state for state in _states_of(part) if state in names]
            if own and name in actors:
                self._left.append(actors[name].export_states.remote(own, pages))
        ray.wait(self._left, num_returns=max(1, len(self._left)))

    def arrive(self) -> bool:
        """Fill the new places; whether all that was held is there."""
        if self._pages is None:
            return False
        calls = {
            name: self._actors[name].import_states.remote(states, self._pages, *self._left)
            for name, states in self._wanted.items()
            if states
        }
        return all(self._actors.ask(calls).values())


def _states_of(part: Part) -> tuple[str, ...]:
    units = [unit for units in part.subgraphs.values() for unit in units]
    return tuple(op.name for unit in units for op in unit.operators if op.state is not None)
