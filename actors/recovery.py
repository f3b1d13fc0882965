"""Going on after a loss: what is left of a fleet gets a plan again, and the engine its sequences.

A step that a lost device took part in is never tried again blindly: all that devices had computed
is given up, and each sequence is computed anew from its ids. Its tokens are the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from raygraft.actors.engine import Engine
from raygraft.actors.events import tell
from raygraft.actors.fleet import Fleet
from raygraft.graph.errors import DeviceLostError, LinkError, PlanError, RaygraftError, RunError
from raygraft.graph.graph import Graph
from raygraft.placement.plan import Plan
from raygraft.placement.schedule import used_devices

OnLoss = Literal["replace", "replan", "fail"]
"""After the loss of a device: start it anew in its place, plan without it, or give up."""
Replan = Callable[[], tuple[Plan, Graph]]
"""A plan over the devices that the fleet has now. Raises PlanError when there is none."""

ATTEMPTS = 3
"""Losses in a row, without a token in between, before the engine gives up."""
PATIENCE_TIMES = 4
LEAST_PATIENCE_SECONDS, PATIENCE_SECONDS = 2.0, 20.0
"""How long a device may finish what it computes when another is lost: so many times the slowest of
the recent steps, at least the one and, when nothing was measured yet, the other."""


class Recovery:
    """Mends an engine. It remembers which devices are missing, and looks for them again."""

    def __init__(self, engine: Engine, policy: OnLoss, replan: Replan) -> None:
        self.policy = policy
        self.count = 0
        """How often the engine went on after a loss."""
        self._engine = engine
        self._replan = replan
        self._missing: set[str] = set()
        self._moved = False
        """Whether a device is on another node than the plan was made for."""
        self._barren = 0

    def load(self) -> None:
        """Load the engine's plan for the first time, with devices that may be lost meanwhile."""
        try:
            self._engine.load()
        except (DeviceLostError, LinkError) as error:
            self.recover(error)

    def returned(self, device: str) -> None:
        """Somebody else has started a device anew."""
        self._missing.discard(device)

    def progress(self) -> None:
        """A token has come: what was lost before is mended."""
        self._barren = 0

    def recover(self, error: RaygraftError) -> None:
        """Let the engine go on after such an error. Raises a RunError when it cannot."""
        if self.policy == "fail" or not isinstance(error, RunError):
            raise error
        while self._barren < ATTEMPTS:
            self._barren += 1
            try:
                self._mend(error)
            except PlanError as refusal:
                self._barren = 0  # the next request may find that a device has returned
                raise RunError(f"{error}; no plan is possible without it: {refusal}") from error
            except RunError as another:  # a device was lost while others were mended
                error = another
            else:
                self.count += 1
                tell("recovered", "the engine goes on", epoch=self._engine.epoch)
                return
        self._barren = 0
        raise error

    def look_again(self, error: RaygraftError) -> None:
        """Before a new request: has what was missing returned? Raises as `recover` does."""
        if self.policy == "fail":
            raise error
        self._return_missing()
        self.recover(error)

    def _mend(self, error: RunError) -> None:
        fleet = self._engine.fleet
        tell("loss", str(error), epoch=self._engine.epoch)
        lost = fleet.end_loops(self._patience())
        if self.policy == "replan":
            fleet.drop(lost)
            self._missing.update(lost)
        else:
            self._missing.update(lost)
            self._return_missing()
        plan, graph = self._engine.plan, self._engine.graph
        if self._moved or self._missing.intersection(used_devices(plan.stages)):
            plan, graph = self._replan()
            self._moved = False
        self._engine.restart(plan, graph)

    def _return_missing(self) -> None:
        """Start devices anew where that is possible; go without the others."""
        fleet = self._engine.fleet
        for name in sorted(self._missing):
            try:
                self._moved |= not _replaced(fleet, name)
                self._missing.discard(name)
            except RunError:
                fleet.drop([name])

    def _patience(self) -> float:
        rounds = self._engine.rounds
        slowest = None if rounds is None else rounds.deadlines.slowest
        if slowest is None:
            return PATIENCE_SECONDS
        return max(LEAST_PATIENCE_SECONDS, PATIENCE_TIMES * slowest)


def _replaced(fleet: Fleet, name: str) -> bool:
    """As `Fleet.replace`; an actor that dies as it starts is given another try."""
    try:
        return fleet.replace(name)
    except DeviceLostError:
        return fleet.replace(name)


def first_plan(fleet: Fleet, policy: OnLoss, replan: Replan) -> tuple[Plan, Graph]:
    """A plan before there is an engine; devices that are lost while they are asked start anew."""
    for attempt in range(ATTEMPTS):
        try:
            return replan()
        except DeviceLostError:
            if policy == "fail" or attempt == ATTEMPTS - 1:
                raise
            for name in fleet.end_loops():
                _replaced(fleet, name)
    raise AssertionError("unreachable")
