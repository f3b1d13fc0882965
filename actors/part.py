"""What an actor is sent: questions before a plan, its devices' parts of it, and its links."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from raygraft.actors.links import Receiver, Sender
from raygraft.actors.records import encoded_size
from raygraft.graph.capability import Limits, RegionSignature, Verdict
from raygraft.graph.graph import Graph, Region, Subgraph
from raygraft.graph.operators import Signature, Value
from raygraft.graph.tensors import TensorInfo, WeightForm
from raygraft.kernels.base import Description, DeviceRing
from raygraft.placement.plan import Plan, Transfer
from raygraft.placement.schedule import Schedule, schedule_of, used_devices

MAX_LOGIT_BIAS = 1024
"""Most biased ids of one request: a control record has room for them."""

HEADER_SIZES = 7
"""Counts at the beginning of a step header."""
SAMPLING_FLOATS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)
"""Sampling parameters that go into a step header for each row that is drawn from."""


@dataclass(frozen=True, slots=True)
class Questions:
    """All that a model asks of a device, in one call. Equal questions are asked once."""

    graph: Graph
    limits: Limits

    def same_as(self, other: Questions) -> bool:
        """Whether the answers must be the same."""
        regions = self.graph.all_regions == other.graph.all_regions
        signatures = self.graph.signatures == other.graph.signatures
        return self.limits == other.limits and regions and signatures


@dataclass(frozen=True, slots=True)
class Answers:
    """A device's answers, from its own backend on its own machine."""

    description: Description
    verdicts: Mapping[Signature, Verdict]
    claims: Mapping[RegionSignature, Verdict]
    found: tuple[Region, ...]
    """Regions that the backend's patterns found, beside those of the graph."""
    weight_bytes: Mapping[WeightForm, int]


@dataclass(frozen=True, slots=True)
class Part:
    """One device's part of a plan: what it loads."""

    regions: Mapping[int, tuple[str, ...]]
    """By stage number."""
    subgraphs: Mapping[int, tuple[Subgraph, ...]]
    """By stage number, one for each of the stage's units."""
    tensors: Mapping[str, TensorInfo]
    """Those that its subgraphs need."""
    limits: Limits
    cache_blocks: int
    block_size: int

    @property
    def states(self) -> tuple[str, ...]:
        """The operators that keep something from step to step."""
        units = [unit for units in self.subgraphs.values() for unit in units]
        return tuple(op.name for unit in units for op in unit.operators if op.state is not None)


@dataclass(frozen=True, slots=True)
class ActorPart:
    """One actor's part of a plan: those of its devices, and the turns that they take."""

    epoch: int
    schedule: Schedule
    parts: Mapping[str, Part]
    """By device."""
    limits: Limits

    @property
    def tensors(self) -> dict[str, TensorInfo]:
        """Those that its devices need."""
        return {name: info for part in self.parts.values() for name, info in part.tensors.items()}

    @property
    def subgraphs(self) -> dict[int, tuple[Subgraph, ...]]:
        """By stage number, of all its devices."""
        return {n: units for part in self.parts.values() for n, units in part.subgraphs.items()}

    @property
    def values(self) -> dict[str, Value]:
        """All that its subgraphs read or write."""
        subgraphs = [unit for units in self.subgraphs.values() for unit in units]
        return {name: value for unit in subgraphs for name, value in unit.values.items()}


@dataclass(frozen=True, slots=True)
class Links:
    """An actor's ends of its links."""

    control: Receiver
    receivers: dict[str, Receiver]
    """By the actor that sends."""
    senders: dict[str, Sender]
    """By the actor that receives, or the engine."""
    rings_in: dict[str, DeviceRing] = field(default_factory=dict)
    """Of actors whose records arrive in a device's memory: these have no receiver."""
    rings_out: dict[str, DeviceRing] = field(default_factory=dict)
    """Of actors whose device's memory is written to: these have no sender."""


def part_of(plan: Plan, graph: Graph, device: str) -> Part:
    """Cut one device's part out of a plan."""
    kinds = {region.name: region.kind for region in graph.all_regions}
    stages = [stage for stage in plan.stages if stage.device == device]
    subgraphs = {
        stage.number: tuple(
            replace(graph.subgraph(unit.operators), claim=kinds[unit.claim] if unit.claim else None)
            for unit in stage.units
        )
        for stage in stages
    }
    needed = {w.tensor for units in subgraphs.values() for unit in units for w in unit.weights}
    return Part(
        regions={stage.number: stage.regions for stage in stages},
        subgraphs=subgraphs,
        tensors={name: graph.tensors[name] for name in needed},
        limits=plan.limits,
        cache_blocks=plan.cache_blocks,
        block_size=plan.block_size,
    )


def actor_part_of(plan: Plan, graph: Graph, actor: str, epoch: int) -> ActorPart:
    """Cut one actor's part out of a plan."""
    own = [name for name in used_devices(plan.stages) if plan.actor_of[name] == actor]
    return ActorPart(
        epoch=epoch,
        schedule=schedule_of(plan, actor),
        parts={name: part_of(plan, graph, name) for name in own},
        limits=plan.limits,
    )


def transfer_bytes(transfer: Transfer, graph: Graph, limits: Limits) -> int:
    """Size of a transfer's record in the largest step."""
    values = [graph.values[name] for name in transfer.values]
    return encoded_size(((limits.max_rows, value.width), value.dtype) for value in values)


def control_bytes(limits: Limits, block_size: int) -> int:
    """Size of the largest step header."""
    rows, sequences = limits.max_rows, limits.max_sequences
    blocks = -(-limits.context // block_size)
    histories, biases = sequences * limits.context, sequences * MAX_LOGIT_BIAS
    per_row = (
        4 + 5
    )  # tokens, positions, sequence, logit rows; top_k, logprobs, position, two starts
    ints = HEADER_SIZES + rows * per_row + 2 + sequences * blocks + histories + biases
    floats = rows * len(SAMPLING_FLOATS) + biases
    return encoded_size([((ints,), np.int32), ((floats,), np.float32), ((rows,), np.int64)])
