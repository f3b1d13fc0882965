"""Another plan for a running engine: regions move to other devices, devices leave and come.

The new plan is made, and what it needs is loaded, while the engine goes on with the old one. The
switch falls between two steps: what is in flight comes back first, then loops and links end, and
those of the new plan begin in a new epoch. Sequences keep what is in the cache, where that stays or
can be copied; else they are computed again from their ids. Either way their tokens are the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock

from raygraft.actors.engine_thread import EngineThread
from raygraft.actors.events import tell
from raygraft.graph.errors import DeviceLostError
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class Move:
    """What a move took."""

    pause_seconds: float
    """Between the last result of the old plan and the first header of the new one."""
    copy_seconds: float
    """The part of it in which what is in the caches was copied."""
    copied_bytes: int
    """How much that was: what went from one device to another."""
    load_seconds: float
    """Before that, while the engine went on."""
    regions: int
    """How many of the plan's regions changed their device."""
    recomputed_tokens: int
    """In the cache before, and to be computed again."""


class Moves:
    """Switches plans, one after the other. Any thread may ask for it."""

    def __init__(self, thread: EngineThread, model: ModelFile) -> None:
        self._thread = thread
        self._model = model
        self._lock = Lock()
        self.count = 0

    def switch(
        self, plan_anew: Callable[[], tuple[Plan, Graph]], leaving: Sequence[str] = ()
    ) -> Move:
        """Go on with another plan; devices that are `leaving` are let go.

        Raises PlanError, and nothing has changed; RunError when a device is lost meanwhile.
        """
        engine, fleet = self._thread.engine, self._thread.engine.fleet
        with self._lock:
            began = time.monotonic()
            plan, graph = plan_anew()
            epoch = engine.epoch
            fleet.prepare(plan, graph, self._model)
            loaded = time.monotonic() - began

            def go() -> Move:
                began = time.monotonic()
                newest = (plan, graph) if engine.epoch == epoch else plan_anew()
                regions = _changed(engine.plan, newest[0])
                held = sum(sequence.computed for sequence in engine.scheduler.running)
                if engine.rounds is not None:
                    engine.rounds.shut_down()
                lost = fleet.end_loops()
                if lost:
                    raise DeviceLostError(f"{', '.join(lost)}: lost during a move")
                try:
                    kept = engine.switch(*newest)
                finally:  # not before: others get what is in their caches
                    fleet.drop(leaving)
                self.count += 1
                paused = time.monotonic() - began
                move = Move(
                    pause_seconds=paused,
                    copy_seconds=engine.copy_seconds,
                    copied_bytes=engine.copied_bytes,
                    load_seconds=loaded,
                    regions=regions,
                    recomputed_tokens=0 if kept else held,
                )
                tell("move", f"{regions} regions moved: {move}", epoch=engine.epoch)
                return move

            return self._thread.call(go)


def _changed(before: Plan, after: Plan) -> int:
    was = before.device_of
    return sum(was.get(region) != device for region, device in after.device_of.items())
