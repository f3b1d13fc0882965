"""A plan: which device computes which region, in which stages, and what travels between them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from pydantic import TypeAdapter, ValidationError

from raygraft.graph.capability import Limits
from raygraft.graph.errors import ConfigurationError


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
    """One record per step: what a stage's device sends another device, or the engine."""

    number: int
    source_stage: int
    source: str
    target: str
    values: tuple[str, ...]
    row_bytes: int
    """Bytes for each row of the step, headers apart."""
    link: str
    """ "ring" on one node, "tcp" between nodes."""


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What a plan asks of one device. All in bytes."""

    device: str
    node: str
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

    @property
    def hops(self) -> int:
        """Records between devices, and to the engine, per step."""
        return len(self.transfers)

    def to_json(self, indent: int | None = None) -> str:
        """As a JSON document; `from_json` reads it."""
        return _ADAPTER.dump_json(self, indent=indent).decode()

    def to_dict(self) -> dict[str, object]:
        """As plain data for a JSON document."""
        data: dict[str, object] = _ADAPTER.dump_python(self, mode="json")
        return data

    @staticmethod
    def from_json(text: str | bytes) -> Plan:
        """Read what `to_json` wrote. Raises ConfigurationError."""
        try:
            return _ADAPTER.validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            raise ConfigurationError(f"not a plan: {place}: {first['msg']}") from error


_ADAPTER = TypeAdapter(Plan)
