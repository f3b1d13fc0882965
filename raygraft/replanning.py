"""Plans for an engine that runs: rules change, and devices come and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from raygraft.actors.fleet import Fleet
from raygraft.actors.part import Questions
from raygraft.graph.capability import Limits
from raygraft.graph.errors import ConfigurationError
from raygraft.graph.graph import Graph
from raygraft.placement.plan import Plan
from raygraft.placement.rules import AnyRule, without_devices
from raygraft.planning import plan_on


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user asks of a plan, as it is now."""

    rules: tuple[AnyRule, ...]
    devices: tuple[str, ...]
    """All that there should be; some may be missing."""
    drained: frozenset[str] = frozenset()
    """Devices that are to be left alone."""

    def with_rules(self, more: Sequence[AnyRule]) -> Wanted:
        """Later rules win; one that is there already comes last again."""
        before = [rule for rule in self.rules if rule not in more]
        return replace(self, rules=(*before, *more))

    def without(self, device: str) -> Wanted:
        """Raises ConfigurationError for a device that is not there."""
        if device not in self.devices or device in self.drained:
            there = ", ".join(name for name in self.devices if name not in self.drained)
            raise ConfigurationError(f"there is no device {device!r}; there are {there}")
        return replace(self, drained=self.drained | {device})

    def with_device(self, device: str) -> Wanted:
        """It may be known already."""
        known = self.devices if device in self.devices else (*self.devices, device)
        return replace(self, devices=known, drained=self.drained - {device})


class Replanner:
    """Makes plans over the devices that a fleet has at the moment."""

    def __init__(
        self,
        fleet: Fleet,
        graph: Graph,
        wanted: Wanted,
        *,
        limits: Limits,
        context: int | None,
        model: str,
    ) -> None:
        self.wanted = wanted
        self._fleet = fleet
        self._graph = graph
        self._limits = limits
        self._context = context
        self._model = model

    def __call__(self) -> tuple[Plan, Graph]:
        """A plan for what is wanted now. Raises PlanError, ConfigurationError."""
        return self.plan_for(self.wanted)

    def plan_for(self, wanted: Wanted) -> tuple[Plan, Graph]:
        """A plan for what may be wanted next. Raises PlanError, ConfigurationError."""
        profiles = self._fleet.profiles(Questions(self._graph, self._limits))
        there = {profile.name for profile in profiles} - wanted.drained
        plan, graph, _ = plan_on(
            self._fleet,
            self._graph,
            without_devices(wanted.rules, {*wanted.devices} - there),
            limits=self._limits,
            context=self._context,
            model=self._model,
            drained=wanted.drained,
        )
        return plan, graph
