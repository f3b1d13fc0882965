"""The Ray actors of a fleet: started, asked, watched and killed."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from raygraft.actors import cluster
from raygraft.actors.fleet import share_of_machine
from raygraft.actors.ray_device import RayDevice
from raygraft.graph.errors import (
    ClusterError,
    ConfigurationError,
    DeviceFailedError,
    DeviceLostError,
    LinkError,
    RaygraftError,
)
from raygraft.kernels.base import BackendOptions
from raygraft.placement.devices import DeviceSpec

START_SECONDS = 120.0
"""Longest wait for actors to start and answer."""
PING_SECONDS = 10.0
"""How long an actor may say nothing, whatever it computes, before it is taken for lost."""
_SLICE_SECONDS = 1.0


class RayActors(Mapping[str, Any]):
    """Device -> its actor."""

    def __init__(self, specs: Sequence[DeviceSpec]) -> None:
        """Find the nodes that the devices ask for. Raises ConfigurationError."""
        self._actors: dict[str, Any] = {}
        self._specs = {spec.name: spec for spec in specs}
        living = cluster.nodes()
        self.own_node = next(node.name for node in living if node.id == cluster.own_node())
        self.nodes = {s.name: cluster.find_node(s.node, s.name, living) for s in specs}
        self._threads: dict[str, int] = {}
        for node in {node.id: node for node in self.nodes.values()}.values():
            here = [spec for spec in specs if self.nodes[spec.name].id == node.id]
            self._threads |= share_of_machine(here, node.cores)
        self._pings: dict[str, tuple[Any, float]] = {}
        self.silent: set[str] = set()
        """Devices that were found not to answer; nothing more is asked of them."""

    def __getitem__(self, name: str) -> Any:
        return self._actors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._actors)

    def __len__(self) -> int:
        return len(self._actors)

    def start(self, names: Collection[str]) -> None:
        """Start actors with their backends. Raises errors of ours, which name the device."""
        self.ask({name: self._start(name) for name in names})

    def _start(self, name: str) -> Any:
        """A new actor, and the call that makes its backend."""
        where = cluster.pinned_to(self.nodes[name])
        actor = RayDevice.options(scheduling_strategy=where)  # type: ignore[attr-defined]
        self._pings.pop(name, None)
        self.silent.discard(name)
        if name in self._actors:
            ray.kill(self._actors[name])
        self._actors[name] = actor.remote(name)
        options = BackendOptions(self._threads[name])
        return self._actors[name].start.remote(self._specs[name].backend, options)

    def add(self, spec: DeviceSpec) -> None:
        """Start one more actor. Raises RunError."""
        self._specs.setdefault(spec.name, spec)
        self._threads.setdefault(spec.name, spec.threads or 1)
        self.start_anew(spec.name)

    def start_anew(self, name: str) -> None:
        """Start an actor in the place of one that is gone. Raises RunError."""
        # Ray may believe in a dead node for a minute.
        living = [node for node in cluster.nodes() if cluster.is_there(node)]
        try:
            self.nodes[name] = cluster.find_node(self._specs[name].node, name, living)
        except ConfigurationError as error:
            raise ClusterError(str(error)) from error
        self.start([name])

    def kill(self, names: Collection[str]) -> None:
        """End actors, whatever they do."""
        for name in names:
            self._pings.pop(name, None)
            if name in self._actors:
                ray.kill(self._actors.pop(name))

    def check_answers(self, names: Collection[str]) -> None:
        """Ask actors for a sign of life now and then. Raises DeviceLostError for a silent one.

        An actor answers while it computes or loads: it is silent when its process is stopped, or
        its node is gone and Ray has not noticed yet.
        """
        now = time.monotonic()
        for name in names:
            call, asked = self._pings.get(name, (None, 0.0))
            answered = call is None or bool(ray.wait([call], timeout=0)[0])
            if answered and now - asked >= _SLICE_SECONDS:
                self._pings[name] = self._actors[name].ping.remote(), now
            elif not answered and now - asked > PING_SECONDS:
                self.silent.add(name)
                raise DeviceLostError(
                    f"device {name} on node {self.nodes[name].address} was lost: "
                    f"its actor has not answered for {PING_SECONDS:.0f} s"
                )

    def ask(
        self, calls: Mapping[str, Any], timeout: float = START_SECONDS, *, watched: bool = False
    ) -> dict[str, Any]:
        """The results of one call per device. Raises errors of ours, which name the device.

        While `watched` actors work on their calls they must give signs of life.
        """
        deadline = time.monotonic() + timeout
        pending = list(calls.values())
        while pending and (left := deadline - time.monotonic()) > 0:
            seconds = min(left, _SLICE_SECONDS) if watched else left
            _, pending = ray.wait(pending, num_returns=len(pending), timeout=seconds)
            if pending and watched:
                self.check_answers([name for name, call in calls.items() if call in pending])
        results = {}
        for name, call in calls.items():
            try:
                results[name] = ray.get(call, timeout=0.1)
            except GetTimeoutError:
                raise ClusterError(
                    f"device {name} on node {self.nodes[name].address} did not answer "
                    f"within {timeout:.0f} s"
                ) from None
            except RayError as error:
                raise self.translated(name, error) from error
        return results

    def translated(self, name: str, error: RayError) -> RaygraftError:
        """One of our errors for one of Ray's."""
        where = f"device {name} on node {self.nodes[name].address}"
        if isinstance(error, RayTaskError):
            cause = error.cause
            if isinstance(cause, RaygraftError):
                return cause
            return DeviceFailedError(f"{where} failed: {type(cause).__name__}: {cause}")
        if isinstance(error, RayActorError):
            return DeviceLostError(f"{where} was lost: its actor died")
        return ClusterError(f"{where}: {error}")


def has_failed(call: Any) -> bool:
    """Whether a call that was given its time did not end well, for another reason than a link."""
    try:
        ray.get(call, timeout=0.1)
    except RayTaskError as error:
        return not isinstance(error.cause, LinkError)
    except (RayError, GetTimeoutError):
        return True
    return False
