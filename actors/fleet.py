"""The seam between the engine and its devices, wherever they live."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from raygraft.actors.links import Receiver, Sender
from raygraft.actors.part import Questions
from raygraft.actors.trace import Recorded
from raygraft.actors.verification import DEADLINE, Progress, Results
from raygraft.actors.worker import Counters
from raygraft.graph.gguf_file import ModelFile
from raygraft.graph.graph import Graph
from raygraft.kernels.base import Description
from raygraft.placement.devices import DeviceProfile, DeviceSpec
from raygraft.placement.plan import Plan


@dataclass(frozen=True, slots=True)
class Wires:
    """The engine's ends of its links."""

    control: Mapping[str, Sender]
    """By actor."""
    results: Receiver
    kept: bool = False
    """Whether the caches hold what they held under the plan before."""
    copy_seconds: float = 0.0
    """What it took to bring that to other devices, where it has to go there."""
    copied_bytes: int = 0
    """How much that was."""
    core_left: bool = False
    """Whether the engine can work while all devices compute, and disturbs none of them."""


class Fleet(Protocol):
    """The devices of one engine."""

    node: str
    """The node of the engine itself."""

    def describe(self) -> dict[str, tuple[str, Description]]:
        """Device -> its node and what it says about itself."""
        ...

    def profiles(self, questions: Questions) -> tuple[DeviceProfile, ...]:
        """The planner's view of the devices. Each is asked in one call, and not again."""
        ...

    def verify(
        self,
        questions: Questions,
        model: ModelFile,
        deadline: float = DEADLINE,
        progress: Progress = lambda _: None,
    ) -> Results:
        """Check all that the devices claim and support, before anything is loaded.

        What fails, or takes more than `deadline` seconds, is withdrawn: it is a no in all later
        profiles. A device that hangs or dies is started anew.
        """
        ...

    def load(
        self,
        plan: Plan,
        graph: Graph,
        model: ModelFile,
        epoch: int,
        pages: Sequence[int] | None = None,
    ) -> Wires:
        """Load a plan's parts, connect them, and start their loops.

        What these pages of the caches hold stays there, or is copied to where they are now, if it
        can be.
        """
        ...

    def check(self) -> None:
        """Raise DeviceLostError or DeviceFailedError when a device has stopped."""
        ...

    def watch(self, noticed: Callable[[], None]) -> None:
        """Call this when a device has left its loop, on any thread; `check` then says why."""
        ...

    def end_loops(self, patience: float = ...) -> tuple[str, ...]:
        """Make all devices leave their loops, and close their links; another plan may be loaded.

        Returns the devices that cannot be used any more: they are dead, have failed, or hang, as
        they have not come to an end within `patience` seconds, or live in one actor with such.
        """
        ...

    def prepare(self, plan: Plan, graph: Graph, model: ModelFile) -> None:
        """Load what another plan needs, as far as that can be done beside the one that runs."""
        ...

    def add(self, spec: DeviceSpec) -> None:
        """Start one more device, or one that was dropped. Raises RunError, ConfigurationError."""
        ...

    def replace(self, name: str) -> bool:
        """Start a device anew that was lost or dropped; whether it is on the node where it was.

        Nothing happens to one that is there. Raises RunError when that is not possible.
        """
        ...

    def drop(self, names: Sequence[str]) -> None:
        """Do without these devices from now on, until they are replaced."""
        ...

    def counters(self) -> dict[str, Counters]:
        """What each device of the plan has done so far."""
        ...

    def start_trace(self) -> None:
        """Have each device of the plan record what it does when."""
        ...

    def recorded(self) -> dict[str, Recorded]:
        """What each device of the plan has recorded."""
        ...

    def shutdown(self) -> None:
        """Stop everything that the fleet started. May be called twice."""
        ...
