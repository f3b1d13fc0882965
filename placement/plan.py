"""A plan: which device computes which region, in which stages, and what travels between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from raygraft.graph.capability import Limits
from raygraft.graph.errors import ConfigurationError
from raygraft.placement.costs import SHARED
from raygraft.placement.devices import ENGINE


@dataclass(frozen=True, slots=True)
class Placement:
    """One region without children, and why it is where it is."""

    region: str
    device: str
    reason: str
    claim: str | None = None
    """The region that the device claims it with, if it does."""


@dataclass(frozen=True, slots=True)
class Unit:
    """What a backend loads and runs as one: a region that it claims, or operators it supports."""

    claim: str | None
    """Name of the claimed region."""
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Stage:
    """A maximal convex run of regions on one device, without a hop inside."""

    number: int
    device: str
    regions: tuple[str, ...]
    units: tuple[Unit, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def operators(self) -> tuple[str, ...]:
        """Names of all its operators, in the order in which they run."""
        return tuple(name for unit in self.units for name in unit.operators)


@dataclass(frozen=True, slots=True)
class Transfer:
    """What a stage's device gives another device, or the engine, in each step.

    It is one record, or nothing at all when both devices live in one actor.
    """

    number: int
    source_stage: int
    source: str
    target: str
    values: tuple[str, ...]
    row_bytes: int
    """Bytes for each row of the step, headers apart."""
    link: str
    """ "ring" on one node, "cuda_ipc" between its GPUs ("cuda_host" where they cannot reach each
    other), "tcp" between nodes, "shared" inside of an actor."""


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What a plan asks of one device. All in bytes."""

    device: str
    node: str
    actor: str
    """Where it lives: devices that share an actor take turns in one loop."""
    type: str
    memory: int
    weights: int
    cache: int
    workspace: int
    stages: int
    seconds_per_token: float
    """Predicted time in its own stages for one row, from nominal bandwidth."""


@dataclass(frozen=True)
class Plan:
    """The planner's answer. Everything stands in the graph's order: plans can be compared."""

    model: str
    limits: Limits
    block_size: int
    """Tokens of one cache page."""
    cache_blocks: int
    """Pages of the cache: the least over the devices that own a part of it."""
    asked: bool
    """Whether every device answered itself; else some answers are declarations."""
    placements: tuple[Placement, ...]
    stages: tuple[Stage, ...]
    """In topological order."""
    transfers: tuple[Transfer, ...]
    """In the order in which they are sent."""
    devices: tuple[DeviceUse, ...]
    seconds_per_token: float
    """Predicted: all stages and hops of a step with one row."""

    @cached_property
    def device_of(self) -> dict[str, str]:
        """Leaf region -> device."""
        return {placement.region: placement.device for placement in self.placements}

    @cached_property
    def actor_of(self) -> dict[str, str]:
        """Device, or the engine -> its actor."""
        return {use.device: use.actor for use in self.devices} | {ENGINE: ENGINE}

    def where(self, use: DeviceUse) -> str:
        """What and where a device is, in words: gpu on 10.0.0.7, with b."""
        beside = [other.device for other in self.devices if other.actor == use.actor]
        beside.remove(use.device)
        place = f"{use.type} on {use.node}" if use.node else use.type
        return f"{place}, with {' and '.join(beside)}" if beside else place

    @property
    def records(self) -> tuple[Transfer, ...]:
        """The transfers that travel: from actor to actor, and to the engine."""
        return tuple(transfer for transfer in self.transfers if transfer.link != SHARED)

    @property
    def hops(self) -> int:
        """Records between actors, and to the engine, per step."""
        return len(self.records)

    def to_json(self, indent: int | None = None) -> str:
        """As a JSON document; `from_json` reads it."""
        text: bytes = _adapter().dump_json(self, indent=indent)
        return text.decode()

    def to_dict(self) -> dict[str, object]:
        """As plain data for a JSON document."""
        data: dict[str, object] = _adapter().dump_python(self, mode="json")
        return data

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """Read what `to_json` wrote. Raises ConfigurationError."""
        from pydantic import ValidationError  # noqa: PLC0415  # as below

        try:
            plan: Plan = _adapter().validate_json(text)
            return plan
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigurationError(f"not a plan: {place}: {first['msg']}") from error


@cache
def _adapter() -> Any:
    from pydantic import TypeAdapter  # noqa: PLC0415  # devices read plans, but no JSON

    return TypeAdapter(Plan)
