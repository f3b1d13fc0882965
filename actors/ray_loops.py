"""The resident loops of Ray actors: started, watched, ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

import ray
from ray.exceptions import RayError

from raygraft.actors.ray_actors import RayActors, has_failed
from raygraft.actors.sharing import named
from raygraft.graph.errors import (
    DeviceFailedError,
    DeviceLostError,
    LinkError,
    RaygraftError,
)

STOP_SECONDS = 2.0
END_SECONDS = 20.0
"""How long a device may go on with what it computes before it is taken for hanging."""
LOSS_SECONDS = 2.0
"""How much later than a broken connection Ray may tell of the actor that died."""


class RayLoops:
    """At most one loop for each actor, those of one plan."""

    def __init__(self, actors: RayActors) -> None:
        self.noticed: Callable[[], None] = lambda: None
        """Called on any thread when a loop has ended."""
        self._actors = actors
        self._loops: dict[Any, str] = {}

    def start(self, names: Collection[str]) -> None:
        """Start the loops of these actors."""
        self._loops = {self._actors[name].run.remote(): name for name in names}
        for loop in self._loops:
            loop.future().add_done_callback(lambda _: self.noticed())

    def check(self) -> None:
        """Raise an error for a loop that has ended, or an actor that gives no sign of life."""
        if self._loops:
            self._actors.check_answers(list(self._loops.values()))
        errors = self._ends()
        deadline = time.monotonic() + LOSS_SECONDS
        # A dead actor makes the links of others fail, sooner than Ray knows; it is the one to name.
        while errors and isinstance(errors[0], LinkError) and time.monotonic() < deadline:
            time.sleep(0.05)
            errors = self._ends()
        if errors:
            raise errors[0]

    def blame(self) -> None:
        """A link of the engine broke: wait a little for the device that explains it."""
        deadline = time.monotonic() + LOSS_SECONDS
        while time.monotonic() < deadline:
            self.check()
            time.sleep(0.05)

    def end(self, lost: Collection[str], patience: float) -> set[str]:
        """Make all loops return, and close their links; the actors that are lost.

        Nothing is asked of those that are known as `lost`.
        """
        loops, self._loops = self._loops, {}
        found = set(lost)
        for name in set(loops.values()) - found:
            self._actors[name].stop.remote()
        awaited = [loop for loop, name in loops.items() if name not in found]
        ended, hanging = ray.wait(awaited, num_returns=max(1, len(awaited)), timeout=patience)
        found.update(loops[loop] for loop in hanging)
        found.update(loops[loop] for loop in ended if has_failed(loop))
        calls = {n: a.close_links.remote() for n, a in self._actors.items() if n not in found}
        ray.wait(list(calls.values()), num_returns=max(1, len(calls)), timeout=patience)
        found.update(name for name, call in calls.items() if has_failed(call))
        return found

    def await_ends(self) -> None:
        """Give loops that were told to end some time for it."""
        if self._loops:
            ray.wait(list(self._loops), num_returns=len(self._loops), timeout=STOP_SECONDS)
        self._loops.clear()

    def _ends(self) -> list[RaygraftError]:
        """Why loops have ended, what explains most first."""
        if not self._loops:
            return []
        ended, _ = ray.wait(list(self._loops), num_returns=len(self._loops), timeout=0)
        errors = [self._end_of(self._loops[loop], loop) for loop in ended]
        return sorted(
            errors, key=lambda e: (not isinstance(e, DeviceLostError), isinstance(e, LinkError))
        )

    def _end_of(self, name: str, loop: Any) -> RaygraftError:
        """Why a loop has ended."""
        try:
            ray.get(loop)
        except RayError as error:
            return self._actors.translated(name, error)
        return DeviceFailedError(
            f"{named(self._actors.devices_of(name))} left the loop without being told to"
        )
