"""How much memory regions take on a device."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from raygraft.graph.capability import Limits
from raygraft.graph.graph import Graph, Region
from raygraft.graph.operators import Operator
from raygraft.graph.tensors import WeightForm, WeightSlice
from raygraft.placement.devices import DeviceProfile


@dataclass(frozen=True, slots=True)
class Footprint:
    """What a region needs wherever it runs. How many bytes its weights take, a device says."""

    slices: tuple[tuple[WeightSlice, WeightForm], ...]
    token_bytes: int
    """Bytes of cache for one token of context."""
    workspace: int
    """Bytes of the inputs and outputs of its widest operator, in the largest step."""

    @classmethod
    def of(cls, graph: Graph, region: Region, limits: Limits) -> Footprint:
        """The footprint of a region under the limits of a plan."""
        operators = [graph.operators[graph.index[name]] for name in region.operators]
        weights = dict.fromkeys(weight for op in operators for _, weight in op.weights)
        states = [op.state for op in operators if op.state is not None]
        return cls(
            tuple((weight, graph.weight_form(weight)) for weight in weights),
            sum(state.token_bytes(limits.cache_type) for state in states),
            max(_workspace(graph, operator, limits) for operator in operators),
        )


def _workspace(graph: Graph, operator: Operator, limits: Limits) -> int:
    total = 0
    for name in (*operator.inputs, *operator.outputs):
        value = graph.values[name]
        rows = limits.max_sequences if value.rows == "logits" else limits.max_rows
        total += value.row_bytes * rows
    return total


class Ledger:
    """What one device holds so far. A weight that several regions share counts once."""

    def __init__(self, graph: Graph, device: DeviceProfile, limits: Limits) -> None:
        self._graph = graph
        self.limits = limits
        self.device = device
        self.slices: set[WeightSlice] = set()
        self.weights = 0
        """Bytes of all its weights."""
        self.token_bytes = 0
        """Bytes of cache for one token of context."""
        self.workspace = 0

    def used(self, tokens: int) -> int:
        """Bytes in all, with a cache for so many tokens."""
        return self.weights + self.workspace + self.token_bytes * tokens

    def with_more(self, footprints: Iterable[Footprint], tokens: int) -> int:
        """Bytes in all, if these were there too."""
        weights, workspace, token_bytes = self.weights, self.workspace, self.token_bytes
        new: set[WeightSlice] = set()
        for footprint in footprints:
            for weight, form in footprint.slices:
                if weight not in self.slices and weight not in new:
                    new.add(weight)
                    weights += self.device.weight_bytes[form]
            token_bytes += footprint.token_bytes
            workspace = max(workspace, footprint.workspace)
        return weights + workspace + token_bytes * tokens

    def put(self, footprint: Footprint) -> None:
        """Put a region on the device, by its footprint."""
        for weight, form in footprint.slices:
            if weight not in self.slices:
                self.slices.add(weight)
                self.weights += self.device.weight_bytes[form]
        self.token_bytes += footprint.token_bytes
        self.workspace = max(self.workspace, footprint.workspace)

    def add(self, leaf: Region) -> None:
        """Put a region on the device."""
        self.put(Footprint.of(self._graph, leaf, self.limits))

    def add_all(self, leaves: Iterable[Region]) -> None:
        """Put several regions on the device."""
        for leaf in leaves:
            self.add(leaf)
