"""A loaded subgraph: its launches, captured as CUDA graphs and replayed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from raygraft.graph.capability import Limits
from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import Operator
from raygraft.graph.step import Step
from raygraft.kernels.base import Array, Runner, Values
from raygraft.kernels.cuda import sampling
from raygraft.kernels.cuda.attention import allocate_cache
from raygraft.kernels.cuda.buffers import FEW, Counts
from raygraft.kernels.cuda.fusion import compile_program
from raygraft.kernels.cuda.gpu import Gpu
from raygraft.kernels.cuda.launches import Launcher
from raygraft.kernels.cuda.memory import Arena
from raygraft.kernels.cuda.step import DeviceStep
from raygraft.kernels.cuda.weights import PackedMatrix, Weight
from raygraft.kernels.reference.sampling import sample

NOT_GREEDY = 0
"""In place of how many log probabilities are wanted, when rows are not sampled on the GPU."""


class Shared:
    """What all subgraphs of a device use together."""

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.arena = Arena(gpu)
        self.step = DeviceStep(gpu)

    @property
    def version(self) -> tuple[int, int]:
        """Changes when an address does; graphs captured before are void."""
        return self.arena.version, self.step.version


class CudaRunner(Runner):
    """Runs a subgraph on the GPU; nothing is waited for before its outputs are wanted."""

    def __init__(
        self,
        shared: Shared,
        subgraph: Subgraph,
        weights: Mapping[str, Mapping[str, Weight]],
        tables: Mapping[str, Any],
        limits: Limits,
    ) -> None:
        """`weights` holds each operator's weights by role, `tables` the angles of each `rope`."""
        self.subgraph = subgraph
        self._shared = shared
        self._gpu = shared.gpu
        self._cache_type = limits.cache_type
        self._samples = [op for op in subgraph.operators if op.kind == "sample"]
        sampled = {name for op in self._samples for name in op.outputs}
        logits = {op.inputs[0]: None for op in self._samples}
        own = tuple(op for op in subgraph.operators if op.kind != "sample")
        outputs = [name for name in subgraph.outputs if name not in sampled]
        made = {name for op in own for name in op.outputs}
        outputs += [name for name in logits if name in made and name not in outputs]
        self._stateful: Sequence[Operator] = [op for op in own if op.state is not None]
        kinds = {op.name: _kind(weights[op.name]["weight"]) for op in own if op.kind == "matmul"}
        plain = replace(subgraph, operators=own, outputs=tuple(outputs))
        self.launcher = Launcher(
            gpu=self._gpu,
            arena=shared.arena,
            step=shared.step,
            program=compile_program(plain, kinds),
            values=subgraph.values,
            weights=weights,
            tables=tables,
            own=id(self),
            kept=frozenset((*subgraph.inputs, *outputs)),
        )
        self._graphs: dict[object, Any] = {}
        self._version: tuple[int, int] | None = None
        self._staging: dict[str, Any] = {}

    def allocate_state(self, blocks: int, block_size: int) -> None:
        """One paged cache for each attention operator."""
        with self._gpu.active():
            self.launcher.attention.caches = {
                op.name: allocate_cache(self._gpu, op.state, blocks, block_size, self._cache_type)
                for op in self._stateful
                if op.state is not None
            }
        self._graphs.clear()

    def export_state(self, name: str, pages: Sequence[int]) -> tuple[Array, ...] | None:
        """Keys and values of the pages, as they lie in the cache."""
        cache = self.launcher.attention.caches[name]
        with self._gpu.active():
            chosen = self._gpu.cupy.asarray(np.asarray(pages, np.int64))
            return tuple(part[chosen].get() for part in (cache.keys, cache.values))

    def import_state(self, name: str, pages: Sequence[int], content: tuple[Array, ...]) -> None:
        """Fill pages with what `export_state` gave."""
        cache = self.launcher.attention.caches[name]
        with self._gpu.active():
            chosen = self._gpu.cupy.asarray(np.asarray(pages, np.int64))
            for part, own in zip((cache.keys, cache.values), content, strict=True):
                part[chosen] = self._gpu.cupy.asarray(own)
            self._gpu.stream.synchronize()

    def run(self, step: Step, inputs: Values) -> dict[str, Array]:
        """Compute one step, from and to the host's memory."""
        with self._gpu.active():
            counts = Counts.of(step)
            self._shared.step.upload(step)
            for name in self.subgraph.inputs:
                if self._count(name, counts):
                    self._copy_in(name, inputs[name], counts)
            greedy = bool(self._samples) and counts.logits > 0
            most = NOT_GREEDY
            if greedy and sampling.is_greedy(step.sampling):
                most = sampling.best_wanted(step.sampling)
            self._replay(counts, most)
            return self._copy_out(step, counts, most, inputs)

    def enqueue(self, counts: Counts, most: int, given: Mapping[str, int]) -> dict[str, int]:
        """Launch a step that has been uploaded; addresses of the outputs.

        `given` are addresses of inputs that lie on this GPU already. The outputs' memory is the
        runner's, and is overwritten by its next step.
        """
        self.launcher.launch(counts, given)
        if most:
            for op in self._samples:
                logits = given.get(op.inputs[0]) or self.launcher.buffers.floats(op.inputs[0])
                vocabulary = self.subgraph.values[op.inputs[0]].width
                sampling.launch_greedy(
                    self._gpu, self._shared.arena, logits, vocabulary, counts.logits, most
                )
        return {
            name: self.launcher.buffers.floats(name)
            for name in self.subgraph.outputs
            if name in self.launcher.buffers.kept
        }

    def _replay(self, counts: Counts, most: int) -> None:
        """Launch as a graph where one was captured; capture one when a step comes again."""
        if max(counts.tokens, counts.logits) > FEW or not self.launcher.program.order:
            self.enqueue(counts, most, {})
            return
        if self._version != self._shared.version:
            self._graphs.clear()
        key = (counts, most)
        graph = self._graphs.get(key)
        if graph is not None:
            graph.launch(self._gpu.stream)
            return
        if key in self._graphs:  # a second time: all is compiled, and all buffers are there
            graph = self.capture(lambda: self.enqueue(counts, most, {}))
            graph.launch(self._gpu.stream)
        else:
            self.enqueue(counts, most, {})
        if self._version != self._shared.version:
            self._graphs.clear()
            self._version = self._shared.version
        self._graphs[key] = graph

    def capture(self, launch: Any) -> Any:
        """The launches of a call as a graph."""
        stream = self._gpu.stream
        stream.begin_capture()
        try:
            launch()
        except BaseException:
            stream.end_capture()
            raise
        return stream.end_capture()

    def _count(self, name: str, counts: Counts) -> int:
        return counts.logits if self.subgraph.values[name].rows == "logits" else counts.tokens

    def _address(self, name: str, counts: Counts) -> int:
        """Of an input or output in a step of so many rows."""
        self.launcher.buffers.start(counts, {})
        return self.launcher.buffers.floats(name)

    def _pinned(self, name: str, size: int) -> Array:
        """Host memory of a value that the GPU copies to or from by itself."""
        found = self._staging.get(name)
        if found is None or found.nbytes < size:
            memory = self._gpu.cupy.cuda.alloc_pinned_memory(size)
            found = self._staging[name] = np.frombuffer(memory, np.uint8, size)
        staging: Array = found[:size]
        return staging

    def _copy_in(self, name: str, values: Array, counts: Counts) -> None:
        staging = self._pinned(name, values.nbytes)
        staging.view(values.dtype).reshape(values.shape)[...] = values
        self._gpu.cupy.cuda.runtime.memcpyAsync(
            self._address(name, counts), staging.ctypes.data, staging.nbytes,
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

    def _copy_out(self, step: Step, counts: Counts, most: int, inputs: Values) -> dict[str, Array]:
        values = self.subgraph.values
        wanted = [name for name in self.subgraph.outputs if name in self.launcher.buffers.kept]
        if self._samples and not most:
            wanted += [op.inputs[0] for op in self._samples if op.inputs[0] not in inputs]
        found: dict[str, Array] = {}
        for name in dict.fromkeys(wanted):
            rows = self._count(name, counts)
            shape, dtype = (rows, values[name].width), np.dtype(values[name].dtype)
            if not rows:
                found[name] = np.empty(shape, dtype)
                continue
            size = rows * values[name].row_bytes
            address = self._address(name, counts)
            found[name] = self._fetch(name, address, size).view(dtype).reshape(shape)
        samples: Array | None = None
        if most:
            size = 8 * counts.logits * (1 + most)
            address = self._shared.arena.room("samples", size, "sampling")
            samples = self._fetch("samples", address, size).view(np.int32)
        self._gpu.stream.synchronize()
        results = {name: array.copy() for name, array in found.items()}
        for op in self._samples:
            if samples is not None:
                sampled = sampling.read_greedy(samples, step.sampling, most)
            else:
                name = op.inputs[0]
                sampled = sample(inputs[name] if name in inputs else results[name], step.sampling)
            results.update(zip(op.outputs, sampled, strict=True))
        return {name: results[name] for name in self.subgraph.outputs}


def _kind(weight: Weight) -> str:
    return weight.format.name if isinstance(weight, PackedMatrix) else "F32"
