"""What one end of a ring launches, whatever carries its records."""

from __future__ import annotations

from collections.abc import Sequence
from weakref import finalize

from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import Value
from raygraft.kernels.cuda.buffers import Counts, capacity
from raygraft.kernels.cuda.shared import Shared
from raygraft.kernels.cuda.unit import Launches


class RingEnd(Launches):
    """Takes a record's values, to memory of its own, or puts them."""

    def __init__(self, shared: Shared, values: Sequence[Value], *, takes: bool) -> None:
        names = tuple(value.name for value in values)
        known = {value.name: value for value in values}
        subgraph = Subgraph((), () if takes else names, names if takes else (), known)
        super().__init__(subgraph, frozenset(subgraph.outputs))
        self._arena = shared.arena
        self._own = object()
        finalize(self, shared.arena.forget, self._own).atexit = False

    def address(self, name: str, counts: Counts) -> int:
        """Of a value's own memory, where it is taken to."""
        value = self.subgraph.values[name]
        size = capacity(counts.rows(value)) * value.row_bytes
        return self._arena.room((self._own, name), size, f"the value {name}")
