"""How much memory regions take on a device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from raygraft.graph.capability import Limits
from raygraft.graph.graph import Graph, Region
from raygraft.graph.operators import Operator
from raygraft.graph.tensors import WeightSlice
from raygraft.placement.devices import DeviceProfile


class Ledger:
    """What one device holds so far. A weight that several regions share counts once."""

    def __init__(self, graph: Graph, device: DeviceProfile, limits: Limits) -> None:
        self._graph = graph
        self.limits = limits
        self.device = device
        self.slices: set[WeightSlice] = set()
        self.token_bytes = 0
        """Bytes of cache for one token of context."""
        self.workspace = 0

    @property
    def weights(self) -> int:
        return sum(self.device.bytes_of(self._graph, weight) for weight in self.slices)

    def used(self, tokens: int) -> int:
        """Bytes in all, with a cache for so many tokens."""
        return self.weights + self.workspace + self.token_bytes * tokens

    def extra(self, leaves: Sequence[Region], tokens: int) -> int:
        """Bytes that these regions would take beside what is there, with a cache for `tokens`."""
        trial = Ledger(self._graph, self.device, self.limits)
        trial.slices = self.slices.copy()
        trial.workspace = self.workspace
        trial.add_all(leaves)
        return trial.used(tokens) - self.weights - self.workspace

    def add(self, leaf: Region) -> None:
        """Put a region on the device."""
        for name in leaf.operators:
            operator = self._graph.operators[self._graph.index[name]]
            self.slices.update(weight for _, weight in operator.weights)
            if operator.state is not None:
                self.token_bytes += operator.state.token_bytes(self.limits.cache_type)
            self.workspace = max(self.workspace, self._workspace(operator))

    def add_all(self, leaves: Iterable[Region]) -> None:
        """Put several regions on the device."""
        for leaf in leaves:
            self.add(leaf)

    def _workspace(self, operator: Operator) -> int:
        """Bytes of an operator's inputs and outputs in the largest step."""
        total = 0
        for name in (*operator.inputs, *operator.outputs):
            value = self._graph.values[name]
            logits = value.rows == "logits"
            rows = self.limits.max_sequences if logits else self.limits.max_rows
            total += value.row_bytes * rows
        return total
