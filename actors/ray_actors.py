"""The Ray actors of a fleet: started, asked, watched and killed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from raygraft.actors import cluster
from raygraft.actors.ray_device import RayDevice
from raygraft.actors.sharing import actors_of, named, threads_of
from raygraft.actors.spares import Spares
from raygraft.graph.errors import (
    ClusterError,
    ConfigurationError,
    DeviceFailedError,
    DeviceLostError,
    LinkError,
    RaygraftError,
)
from raygraft.placement.devices import DeviceSpec

START_SECONDS = 120.0
"""Longest wait for actors to start and answer."""
PING_SECONDS = 10.0
"""How long an actor may say nothing, whatever it computes, before it is taken for lost."""
_SLICE_SECONDS = 1.0


class RayActors(Mapping[str, Any]):
    """The actors that there are, by name; each holds one device or more."""

    def __init__(
        self,
        specs: Sequence[DeviceSpec],
        spares: int = 0,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Find the nodes that the devices ask for. Raises ConfigurationError."""
        self._progress = progress
        self._said = ""
        """What was told last of what actors are about."""
        self.spares = Spares(spares)
        self.found_files: dict[str, tuple[object, bool]] = {}
        """By actor: whether it found files on its machine; which actor it was, and which files."""
        self._actors: dict[str, Any] = {}
        self._devices: dict[str, list[str]] = {}
        """Actor -> the devices that it holds."""
        living = cluster.nodes()
        self.own_node = next(node.name for node in living if node.id == cluster.own_node())
        self.nodes = {s.name: cluster.find_node(s.node, s.name, living) for s in specs}
        """By device."""
        self.specs: dict[str, DeviceSpec] = {}
        """By device, each with its threads."""
        self.actor_of: dict[str, str] = {}
        self._place(specs)
        for node in {node.id: node for node in self.nodes.values()}.values():
            here = [spec for spec in specs if self.nodes[spec.name].id == node.id]
            for name, threads in threads_of(here, self.actor_of, node.cores).items():
                self.specs[name] = self.specs[name].with_threads(threads)
        self._pings: dict[str, tuple[Any, float]] = {}
        self.silent: set[str] = set()
        """Actors that were found not to answer; nothing more is asked of them."""

    def __getitem__(self, name: str) -> Any:
        """Raises DeviceLostError: who is asked for was there once, and may be there again."""
        if name not in self:
            raise DeviceLostError(f"actor {name} is not there: it was lost, and is not back yet")
        return self._actors[name]

    def __contains__(self, name: object) -> bool:
        return name in self._actors

    def get(self, name: str, default: Any = None) -> Any:
        """The actor, or else the default. (A mapping's own would wait for a KeyError.)"""
        return self._actors.get(name, default)

    def __iter__(self) -> Iterator[str]:
        return iter(self._actors)

    def __len__(self) -> int:
        return len(self._actors)

    def _place(self, specs: Sequence[DeviceSpec]) -> None:
        """Know more devices, and in which actors they live. Raises ConfigurationError."""
        every = self.specs | {spec.name: spec for spec in specs}
        nodes = {name: self.nodes[name].name for name in every}
        self.actor_of = actors_of(tuple(every.values()), nodes)
        self.specs = every

    @property
    def devices(self) -> list[str]:
        """All devices that are there, in their order."""
        held = {name for devices in self._devices.values() for name in devices}
        return [name for name in self.specs if name in held]

    def devices_of(self, actor: str) -> tuple[str, ...]:
        """The devices that an actor holds."""
        return tuple(self._devices.get(actor, ()))

    def start(self, names: Collection[str]) -> None:
        """Start devices, each in its actor. Raises errors of ours, which name them."""
        calls = [(self.actor_of[name], self._start(name)) for name in names]
        for actor, call in calls:
            self.ask({actor: call})

    def _start(self, name: str) -> Any:
        """The call that makes a device's backend, in its actor or in a new one."""
        actor = self.actor_of[name]
        if actor not in self._actors:
            where = cluster.pinned_to(self.nodes[name])
            made = RayDevice.options(scheduling_strategy=where)  # type: ignore[attr-defined]
            spare = self.spares.take(self.nodes[name], actor)
            self._actors[actor] = made.remote(actor) if spare is None else spare
            self._devices[actor] = []
        own = self._devices[actor]
        if name not in own:
            own.append(name)
        self.nodes[name] = self.nodes[own[0]]
        return self._actors[actor].start.remote(self.specs[name])

    def add(self, spec: DeviceSpec) -> None:
        """Start one more device. Raises RunError, ConfigurationError."""
        if spec.name not in self.specs:
            self._find_node(spec)
            self._place([spec.with_threads(1)])
        self.start_anew(spec.name)

    def start_anew(self, name: str) -> None:
        """Start a device in the place of one that is gone. Raises RunError."""
        if self.actor_of[name] not in self._actors:
            self._find_node(self.specs[name])
        try:
            self.start([name])
        except DeviceLostError:
            self.kill([self.actor_of[name]])
            raise

    def _find_node(self, spec: DeviceSpec) -> None:
        # Ray may believe in a dead node for a minute.
        living = [node for node in cluster.nodes() if cluster.is_there(node)]
        try:
            self.nodes[spec.name] = cluster.find_node(spec.node, spec.name, living)
        except ConfigurationError as error:
            raise ClusterError(str(error)) from error

    def restart(self, actor: str) -> None:
        """Start an actor in the place of one that hangs or is dead, with all that it held."""
        devices = self.devices_of(actor)
        self.kill([actor])
        self.start(devices)

    def remove(self, names: Collection[str]) -> None:
        """Let go of devices; an actor that has no more of them ends."""
        for name in names:
            actor = self.actor_of[name]
            left = [own for own in self.devices_of(actor) if own != name]
            if not left:
                self.kill([actor])
            elif name in self._devices[actor]:
                self._devices[actor] = left
                self._actors[actor].remove.remote(name)

    def kill(self, actors: Collection[str]) -> None:
        """End actors, whatever they do."""
        for name in actors:
            self._pings.pop(name, None)
            self._devices.pop(name, None)
            self.silent.discard(name)
            if name in self._actors:
                ray.kill(self._actors.pop(name))

    def title(self, actor: str) -> str:
        """An actor for messages: its devices, and where they are."""
        names = self.devices_of(actor) or [n for n, own in self.actor_of.items() if own == actor]
        return f"{named(names)} on node {self.nodes[names[0]].address}"

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
                self._tell(call)
                self._pings[name] = self._actors[name].ping.remote(), now
            elif not answered and now - asked > PING_SECONDS:
                self.silent.add(name)
                raise DeviceLostError(
                    f"{self.title(name)} was lost: "
                    f"its actor has not answered for {PING_SECONDS:.0f} s"
                )

    def _tell(self, ping: Any) -> None:
        """Say what an actor is about, if it takes long and was not said already."""
        try:
            doing = ray.get(ping) if ping is not None else ""
        except RayError:  # the call that is waited for says what happened
            return
        if doing and doing != self._said:
            self._said = doing
            self._progress(doing)

    def ask(
        self, calls: Mapping[str, Any], timeout: float = START_SECONDS, *, watched: bool = False
    ) -> dict[str, Any]:
        """The results of one call per actor. Raises errors of ours, which name the devices.

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
                    f"{self.title(name)} did not answer within {timeout:.0f} s"
                ) from None
            except RayError as error:
                raise self.translated(name, error) from error
        return results

    def translated(self, name: str, error: RayError) -> RaygraftError:
        """One of our errors for one of Ray's."""
        where = self.title(name)
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
