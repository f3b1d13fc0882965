"""A model's graph, its tree of regions, and the subgraphs cut out of it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from raygraft.graph.capability import RegionSignature
from raygraft.graph.errors import ConfigurationError
from raygraft.graph.operators import KeyValueState, Operator, Signature, Value, signature_of
from raygraft.graph.tensors import TensorInfo, WeightForm, WeightSlice


@dataclass(frozen=True, slots=True)
class Region:
    """A named functional subgraph, in a tree: `blk.3` > `blk.3.attn` > `blk.3.attn.qkv`."""

    name: str
    kind: str
    parent: str | None
    children: tuple[str, ...]
    operators: tuple[str, ...]
    """Names of all operators below, in the graph's order."""


@dataclass(frozen=True, slots=True)
class Subgraph:
    """Operators that run as one unit. Inputs and outputs follow from the data flow."""

    operators: tuple[Operator, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    values: Mapping[str, Value]
    """All values that its operators read or write."""
    claim: str | None = None
    """Kind of the region, when a backend claims it as one unit."""

    @property
    def weights(self) -> tuple[WeightSlice, ...]:
        """Each weight slice once, in order of first use."""
        return tuple(dict.fromkeys(w for op in self.operators for _, w in op.weights))

    @property
    def states(self) -> tuple[KeyValueState, ...]:
        return tuple(op.state for op in self.operators if op.state is not None)


@dataclass(frozen=True, slots=True)
class Dimensions:
    """The sizes of a model that the rest of the program asks for."""

    blocks: int
    width: int
    vocabulary: int
    context: int
    """The context that the model was trained for, in tokens."""


@dataclass(frozen=True)
class Graph:
    """A model: operators in topological order, the values between them, and the regions."""

    architecture: str
    dimensions: Dimensions
    operators: tuple[Operator, ...]
    values: Mapping[str, Value]
    regions: Mapping[str, Region]
    """By name, parents before children, in the order of the data flow."""
    tensors: Mapping[str, TensorInfo]
    results: tuple[str, ...]
    """The values that leave the graph: what the engine receives."""
    own_regions: tuple[Region, ...] = ()
    """Regions beside the tree: named by the user, or found by a backend's pattern."""

    @cached_property
    def index(self) -> Mapping[str, int]:
        """Position of each operator in the topological order."""
        return {op.name: number for number, op in enumerate(self.operators)}

    @cached_property
    def producer(self) -> Mapping[str, Operator]:
        """The operator that produces each value."""
        return {value: op for op in self.operators for value in op.outputs}

    @cached_property
    def consumers(self) -> Mapping[str, tuple[Operator, ...]]:
        """The operators that read each value."""
        found: dict[str, list[Operator]] = {name: [] for name in self.values}
        for op in self.operators:
            for value in op.inputs:
                found[value].append(op)
        return {name: tuple(ops) for name, ops in found.items()}

    @property
    def all_regions(self) -> tuple[Region, ...]:
        """The regions of the tree, then those beside it."""
        return (*self.regions.values(), *self.own_regions)

    def with_region(self, name: str, kind: str, operators: Collection[str]) -> Graph:
        """A graph with one more region, which may cut across the tree.

        Raises ConfigurationError when the name is taken or the operators are not convex.
        """
        if any(region.name == name for region in self.all_regions):
            raise ConfigurationError(f"there is a region named {name!r} already")
        if not self.is_convex(operators):
            raise ConfigurationError(
                f"region {name!r} is not convex: a path leaves it and comes back, "
                "so it cannot run as one"
            )
        ordered = tuple(op.name for op in self.operators if op.name in frozenset(operators))
        region = Region(name, kind, None, (), ordered)
        return replace(self, own_regions=(*self.own_regions, region))

    @cached_property
    def atoms(self) -> tuple[Region, ...]:
        """The smallest pieces that are placed: the leaves, cut where other regions cut them.

        Every region, in the tree or beside it, is a union of atoms. An atom is a run in the
        topological order, so it is convex, and atoms in this order are in topological order too.
        """
        leaf_of = {name: leaf for leaf in self.leaves for name in leaf.operators}
        runs: list[tuple[Region, list[str]]] = []
        before: object = None
        for op in self.operators:
            own = {region.name for region in self.own_regions if op.name in region.operators}
            key = (leaf_of[op.name].name, own)
            if key != before:
                runs.append((leaf_of[op.name], []))
            runs[-1][1].append(op.name)
            before = key
        atoms = []
        for leaf, operators in runs:
            whole = len(operators) == len(leaf.operators)
            name = leaf.name if whole else f"{leaf.name}#{leaf.operators.index(operators[0])}"
            atoms.append(Region(name, leaf.kind, leaf.parent, (), tuple(operators)))
        return tuple(atoms)

    @cached_property
    def leaves(self) -> tuple[Region, ...]:
        """The regions without children; together they hold every operator once."""
        return tuple(region for region in self.regions.values() if not region.children)

    def signature(self, operator: Operator) -> Signature:
        """What decides whether a backend can run this operator."""
        return self._signatures[operator.name]

    @cached_property
    def _signatures(self) -> Mapping[str, Signature]:
        return {op.name: signature_of(op, self.values, self.tensors) for op in self.operators}

    def region_signature(self, region: Region) -> RegionSignature:
        """What decides whether a backend claims this region."""
        return RegionSignature(
            region.kind, tuple(self._signatures[name] for name in region.operators)
        )

    def subgraph(self, names: Collection[str]) -> Subgraph:
        """The subgraph of these operators, with inputs and outputs derived from the data flow."""
        chosen = frozenset(names)
        operators = tuple(self.operators[n] for n in sorted(self.index[name] for name in chosen))
        inputs = dict.fromkeys(
            value
            for op in operators
            for value in op.inputs
            if self.producer[value].name not in chosen
        )
        outputs = [
            value
            for op in operators
            for value in op.outputs
            if value in self.results
            or any(reader.name not in chosen for reader in self.consumers[value])
        ]
        names = dict.fromkeys(name for op in operators for name in (*op.inputs, *op.outputs))
        values = {name: self.values[name] for name in names}
        return Subgraph(operators, tuple(inputs), tuple(outputs), values)

    def is_convex(self, names: Collection[str]) -> bool:
        """Whether no path leaves these operators and comes back: only then can they run as one."""
        chosen = frozenset(names)
        last = max(self.index[name] for name in chosen)
        outside: set[str] = set()  # operators outside that depend on chosen ones
        for op in self.operators[: last + 1]:
            sources = {self.producer[value].name for value in op.inputs}
            if op.name in chosen:
                if sources & outside:
                    return False
            elif sources & chosen or sources & outside:
                outside.add(op.name)
        return True

    def descendants(self, region: Region) -> Iterator[Region]:
        """The region and all regions below it, parents first."""
        yield region
        for child in region.children:
            yield from self.descendants(self.regions[child])

    def weight_form(self, weight: WeightSlice) -> WeightForm:
        """Type and shape of a weight."""
        info = self.tensors[weight.tensor]
        return info.type, weight.shape(info)

    @cached_property
    def signatures(self) -> tuple[Signature, ...]:
        """The distinct signatures: what a device is asked about."""
        return tuple(dict.fromkeys(self._signatures.values()))

    @cached_property
    def weight_forms(self) -> tuple[WeightForm, ...]:
        """The distinct types and shapes of its weights."""
        weights = (weight for op in self.operators for _, weight in op.weights)
        return tuple(dict.fromkeys(self.weight_form(weight) for weight in weights))
