"""A backend whose devices write to each other's memory, as GPUs do: here all is one process's.

A record that is taken must be the expected one, to the value; what is put is copied.
"""

import queue
import time

from raygraft.graph.errors import LinkError
from raygraft.kernels.base import DeviceRing, Runner
from raygraft.kernels.reference.backend import ReferenceBackend
from raygraft.placement.costs import DIRECT


class Shared:
    """What devices of one actor share."""

    interrupted = False
    counts = {"put": 0, "taken": 0, "runs": 0}  # noqa: RUF012  # of all actors


class Chained(Runner):
    """Runners of one actor, one after the other."""

    def __init__(self, shared, parts, outputs):
        self.shared, self.parts, self.outputs = shared, parts, outputs

    def allocate_state(self, blocks, block_size):
        for part in self.parts:
            part.allocate_state(blocks, block_size)

    def leads_to(self, following):
        return isinstance(following, Chained) and following.shared is self.shared

    def chain(self, following, outputs):
        assert all(other.shared is self.shared for other in following)
        return Chained(self.shared, [self, *following], tuple(outputs))

    def run(self, step, inputs):
        self.shared.counts["runs"] += self.outputs is not None
        known = dict(inputs)
        for part in self.parts:
            known.update(part.run(step, known))
        return {n: v for n, v in known.items() if self.outputs is None or n in self.outputs}


class Unit(Chained):
    """A loaded subgraph; it is handed only what it asks for."""

    def __init__(self, shared, subgraph, runner):
        super().__init__(shared, [runner], None)
        self.subgraph = subgraph

    def run(self, step, inputs):
        return self.parts[0].run(step, {name: inputs[name] for name in self.subgraph.inputs})


class Put(Chained):
    def __init__(self, shared, records, values):
        super().__init__(shared, [], None)
        self.records, self.names = records, [value.name for value in values]

    def run(self, step, inputs):
        self.shared.counts["put"] += 1
        record = {name: inputs[name].copy() for name in self.names}
        self.records.put_nowait(record)  # there are slots enough
        return {}


class Take(Put):
    def run(self, step, inputs):
        self.shared.counts["taken"] += 1
        while not self.shared.interrupted:
            try:
                record = self.records.get(timeout=0.01)
            except queue.Empty:
                continue
            assert [*record] == self.names
            return record
        raise LinkError("interrupted")


class Ring(DeviceRing):
    def __init__(self, shared, records, kind):
        self.shared, self.records, self.kind = shared, records, kind

    def runner(self, values):
        return self.kind(self.shared, self.records, values)

    def close(self):
        self.shared = None


class Direct(ReferenceBackend):
    """On a GPU of its own, if one believes it."""

    counts = Shared.counts

    def __init__(self, options):
        super().__init__(options)
        self.shared = options.commons.get("direct", Shared)

    def describe(self):
        found = super().describe()
        return type(found)(**{f: getattr(found, f) for f in found.__slots__} | {"link": DIRECT})

    def load(self, subgraph, weights, limits):
        return Unit(self.shared, subgraph, super().load(subgraph, weights, limits))

    def open_ring(self, slots, slot_bytes, link):
        assert slots > 0 < slot_bytes
        records = queue.Queue(slots)
        return Ring(self.shared, records, Take), records

    def join_ring(self, opened):
        return Ring(self.shared, opened, Put)

    def interrupt(self, wanted):
        self.shared.interrupted = wanted


class Slow(Direct):
    """Whose stages wait, so that something can happen meanwhile."""

    def load(self, subgraph, weights, limits):
        unit = super().load(subgraph, weights, limits)
        run = unit.run

        def slowly(step, inputs):
            time.sleep(0.02)
            return run(step, inputs)

        unit.run = slowly
        return unit


class Far(Direct):
    """Which others can open, but not reach."""

    def open_ring(self, slots, slot_bytes, link):
        return Ring(self.shared, queue.Queue(slots), Take), "anything"

    def join_ring(self, opened):
        assert opened == "anything"
        raise LinkError("there is no way from GPU to GPU")
