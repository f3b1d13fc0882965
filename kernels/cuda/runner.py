"""Steps of one subgraph, or of several that follow each other: captured as graphs, replayed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np

from raygraft.graph.step import Step
from raygraft.kernels.base import Array, Runner, Started, Values
from raygraft.kernels.cuda import sampling
from raygraft.kernels.cuda.buffers import FEW, Counts
from raygraft.kernels.cuda.sampled_rows import Wanted
from raygraft.kernels.cuda.shared import Shared
from raygraft.kernels.cuda.unit import Launches


class CudaRunner(Runner):
    """Runs units on the GPU; nothing is waited for before the last one's outputs are wanted."""

    def __init__(
        self, shared: Shared, units: Sequence[Launches], outputs: Collection[str] | None = None
    ) -> None:
        """Each unit may read what those before it have made; `outputs` are those of the last."""
        self.units = tuple(units)
        self._shared = shared
        self._gpu = shared.gpu
        self._values = {n: v for unit in units for n, v in unit.subgraph.values.items()}
        self._maker = {name: unit for unit in units for name in unit.made}
        self._samples = [op for unit in units for op in unit.samples]
        sampled = {name for op in self._samples for name in op.outputs}
        self._outputs = tuple(units[-1].subgraph.outputs if outputs is None else outputs)
        self._fetched = [name for name in self._outputs if name not in sampled]
        self._reader = {
            name: unit
            for unit in reversed(self.units)
            for name in unit.subgraph.inputs
            if name not in self._maker
        }
        """Inputs, each with the first unit that reads it: there it is copied to."""
        self._graphs: dict[object, Any] = {}
        self._version: tuple[int, int] | None = None
        self._staging: dict[tuple[str, bool], Any] = {}
        self._events: dict[bool, Any] = {}
        self._second = False
        """Of two steps that may be under way."""

    def leads_to(self, following: Runner) -> bool:
        """On one GPU, in one actor, addresses are handed on."""
        return isinstance(following, CudaRunner) and following._shared is self._shared

    def chain(self, following: Sequence[Runner], outputs: Collection[str]) -> CudaRunner:
        """One graph for all of them."""
        runners = [self, *(runner for runner in following if isinstance(runner, CudaRunner))]
        return CudaRunner(
            self._shared, [unit for runner in runners for unit in runner.units], outputs
        )

    def allocate_state(self, blocks: int, block_size: int) -> None:
        """One paged cache for each attention operator."""
        for unit in self.units:
            unit.allocate_state(blocks, block_size)
        self._graphs.clear()

    def export_state(self, name: str, pages: Sequence[int]) -> tuple[Array, ...] | None:
        """Keys and values of the pages, as they lie in the cache."""
        return self._owner(name).export_state(name, pages)

    def import_state(self, name: str, pages: Sequence[int], content: tuple[Array, ...]) -> None:
        """Fill pages with what `export_state` gave."""
        self._owner(name).import_state(name, pages, content)

    def _owner(self, state: str) -> Launches:
        return next(unit for unit in self.units if state in unit.states)

    def run(self, step: Step, inputs: Values) -> dict[str, Array]:
        """Compute one step, from and to the host's memory."""
        return self.start(step, inputs).finish()

    def start(self, step: Step, inputs: Values) -> StartedRun:
        """See `Runner.start`. What the host reads and writes lies apart from the last step's."""
        self._second = not self._second
        with self._gpu.active():
            counts = Counts.of(step)
            self._shared.step.upload(step)
            for name, unit in self._reader.items():
                if counts.rows(self._values[name]):
                    self._copy_in(name, inputs[name], unit.address(name, counts))
            wanted = Wanted.of(step.sampling) if self._samples else Wanted()
            self._replay(counts, wanted)
            return self._start_copies(step, counts, wanted)

    def enqueue(self, counts: Counts, wanted: Wanted) -> None:
        """Launch a step that has been uploaded, whose inputs lie where they are copied to."""
        known = {name: unit.address(name, counts) for name, unit in self._reader.items()}
        for unit in self.units:
            given = {name: known[name] for name in unit.subgraph.inputs}
            known.update(unit.enqueue(counts, wanted, given))

    def _replay(self, counts: Counts, wanted: Wanted) -> None:
        """Launch as a graph where one was captured; capture one when a step comes again."""
        empty = not any(unit.launches for unit in self.units)
        if max(counts.tokens, counts.logits) > FEW or empty:
            self.enqueue(counts, wanted)
            return
        if self._version != self._shared.version:
            self._graphs.clear()
        key = (counts, wanted)
        graph = self._graphs.get(key)
        if graph is not None:
            graph.launch(self._gpu.stream)
            return
        if key in self._graphs:  # a second time: all is compiled, and all buffers are there
            graph = self.capture(lambda: self.enqueue(counts, wanted))
            graph.launch(self._gpu.stream)
        else:
            self.enqueue(counts, wanted)
        if self._version != self._shared.version:
            self._graphs.clear()
            self._version = self._shared.version
        self._graphs[key] = graph

    def capture(self, launch: Callable[[], object]) -> Any:
        """The launches of a call as a graph."""
        stream = self._gpu.stream
        stream.begin_capture()
        try:
            launch()
        except BaseException:
            stream.end_capture()
            raise
        return stream.end_capture()

    def _pinned(self, name: str, size: int) -> Array:
        """Host memory of a value that the GPU copies to or from by itself."""
        key = (name, self._second)
        found = self._staging.get(key)
        if found is None or found.nbytes < size:
            memory = self._gpu.cupy.cuda.alloc_pinned_memory(size)
            found = self._staging[key] = np.frombuffer(memory, np.uint8, size)
        staging: Array = found[:size]
        return staging

    def _copy_in(self, name: str, values: Array, address: int) -> None:
        staging = self._pinned(name, values.nbytes)
        staging.view(values.dtype).reshape(values.shape)[...] = values
        self._gpu.cupy.cuda.runtime.memcpyAsync(
            address, staging.ctypes.data, staging.nbytes,
            self._gpu.cupy.cuda.runtime.memcpyHostToDevice, self._gpu.stream.ptr,
        )  # fmt: skip

    def _fetch(self, name: str, address: int, size: int) -> Array:
        """Start to copy device memory to the host."""
        staging = self._pinned(name, size)
        self._gpu.cupy.cuda.runtime.memcpyAsync(
            staging.ctypes.data, address, size,
            self._gpu.cupy.cuda.runtime.memcpyDeviceToHost, self._gpu.stream.ptr,
        )  # fmt: skip
        return staging

    def _start_copies(self, step: Step, counts: Counts, wanted: Wanted) -> StartedRun:
        """Let results be copied to the host as soon as they are there."""
        found: dict[str, Array] = {}
        for name in self._fetched:
            value = self._values[name]
            rows = counts.rows(value)
            shape, dtype = (rows, value.width), np.dtype(value.dtype)
            if not rows:
                found[name] = np.empty(shape, dtype)
                continue
            address = self._maker[name].address(name, counts)
            found[name] = self._fetch(name, address, rows * value.row_bytes)
            found[name] = found[name].view(dtype).reshape(shape)
        samples = np.empty(0, np.int32)
        if self._samples and counts.logits:
            size = wanted.size(counts.logits)
            place = sampling.results(self._shared.arena, size)
            samples = self._fetch("samples", place, size).view(np.int32)
        done = self._events[self._second] = self._gpu.mark(self._events.get(self._second))
        draws = len(samples) > 0 and not self._reader

        def results() -> dict[str, Array]:
            with self._gpu.active():
                done.synchronize()
            values = {name: array.copy() for name, array in found.items()}
            for op in self._samples:
                sampled = sampling.read(samples, step.sampling, wanted)
                values.update(zip(op.outputs, sampled, strict=True))
            return {name: values[name] for name in self._outputs}

        return StartedRun(done, results, draws)


class StartedRun(Started):
    """A step under way on the GPU's stream."""

    def __init__(self, event: Any, results: Callable[[], dict[str, Array]], draws: bool) -> None:
        self._event = event
        self._results = results
        self.draws = draws

    def done(self) -> bool:
        """See `Started.done`."""
        return bool(self._event.done)

    def finish(self) -> dict[str, Array]:
        """See `Started.finish`."""
        return self._results()
