"""What becomes of caches when a plan follows another: some stay where they are, some move."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field

from raygraft.actors.part import ActorPart
from raygraft.kernels.base import Array, Runner

Names = Mapping[str, tuple[str, ...]]
"""Device -> states, by the names of their operators."""


@dataclass(frozen=True, slots=True)
class Staying:
    """States that devices of an actor have under both plans, and the pages that hold something."""

    names: Names = field(default_factory=dict)
    pages: Sequence[int] = ()


NOTHING_STAYS = Staying()


@dataclass(frozen=True, slots=True)
class Journeys:
    """Where states go when a plan follows another. Everything is by actor."""

    staying: Mapping[str, Staying]
    arriving: Mapping[str, Names]
    """What other devices had. Actors without anything are left out, here and below."""
    leaving: Mapping[str, tuple[str, ...]]

    @classmethod
    def between(
        cls,
        before: Mapping[str, ActorPart],
        after: Mapping[str, ActorPart],
        pages: Sequence[int] | None,
    ) -> Journeys:
        """From one plan to the next; nobody goes or stays when no page holds anything."""
        if not pages:
            return cls({}, {}, {})
        had = {name: {*own.states} for part in before.values() for name, own in part.parts.items()}
        staying: dict[str, Staying] = {}
        arriving: dict[str, Names] = {}
        for actor, part in after.items():
            now = {name: {*own.states} for name, own in part.parts.items()}
            kept = {name: own & had.get(name, set()) for name, own in now.items()}
            staying[actor] = Staying(_sorted(kept), pages)
            if new := _sorted({name: own - kept[name] for name, own in now.items()}):
                arriving[actor] = new
        wanted = {s for names in arriving.values() for states in names.values() for s in states}
        held = {
            actor: {state for name in part.parts for state in had[name]} & wanted
            for actor, part in before.items()
        }
        return cls(staying, arriving, _sorted(held))


def _sorted(sets: Mapping[str, Set[str]]) -> dict[str, tuple[str, ...]]:
    """Those that are not empty, in order."""
    return {name: tuple(sorted(own)) for name, own in sets.items() if own}


class KeptStates:
    """What is in the caches of a device, from its part of one plan to that of the next."""

    def __init__(
        self, runners: Mapping[str, Runner], names: Sequence[str], pages: Sequence[int]
    ) -> None:
        """Take it from the runners of states; they may be let go of then."""
        self._names = tuple(names)
        self._pages = pages
        self._states: dict[str, object] = {}
        self._content: dict[str, tuple[Array, ...]] = {}
        for name in names:
            runner = runners.get(name)
            state = None if runner is None else runner.hand_on_state(name)
            if state is not None:
                self._states[name] = state
            elif runner is not None and (content := runner.export_state(name, pages)) is not None:
                self._content[name] = content

    def give(self, runners: Mapping[str, Runner]) -> bool:
        """Let other runners have it; whether they have all of it."""
        for name in self._names:
            if name in self._content:
                runners[name].import_state(name, self._pages, self._content[name])
            elif name not in self._states or not runners[name].take_state(name, self._states[name]):
                return False
        return True
