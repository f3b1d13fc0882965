"""A loaded subgraph on a GPU: its weights, its caches, its launches."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import finalize

import numpy as np

from raygraft.graph.capability import Limits
from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import Operator
from raygraft.kernels.base import Array
from raygraft.kernels.cuda import sampling
from raygraft.kernels.cuda.attention import allocate_cache
from raygraft.kernels.cuda.buffers import Counts
from raygraft.kernels.cuda.fusion import compile_program
from raygraft.kernels.cuda.launches import Launcher
from raygraft.kernels.cuda.sampled_rows import Wanted
from raygraft.kernels.cuda.shared import Shared
from raygraft.kernels.cuda.weights import PackedMatrix, Weight


class Launches(ABC):
    """What is launched at its place in a chain: a loaded subgraph, or one end of a ring.

    Inputs and outputs are addresses.
    """

    samples: Sequence[Operator] = ()
    """Operators that sample: see `CudaRunner`."""
    launches = True
    """Whether there is anything to launch."""

    def __init__(self, subgraph: Subgraph, made: frozenset[str]) -> None:
        self.subgraph = subgraph
        self.made = made
        """Values that are there after a step."""

    def allocate_state(self, blocks: int, block_size: int) -> None:  # noqa: B027  # most have none
        """See `Runner.allocate_state`."""

    @property
    def states(self) -> frozenset[str]:
        """The attention operators whose caches it has."""
        return frozenset()

    def export_state(self, name: str, pages: Sequence[int]) -> tuple[Array, ...]:
        """See `Runner.export_state`."""
        raise NotImplementedError

    def import_state(self, name: str, pages: Sequence[int], content: tuple[Array, ...]) -> None:
        """See `Runner.import_state`."""
        raise NotImplementedError

    @abstractmethod
    def address(self, name: str, counts: Counts) -> int:
        """Of an input's or output's own memory in a step of so many rows."""

    @abstractmethod
    def enqueue(self, counts: Counts, wanted: Wanted, given: Mapping[str, int]) -> dict[str, int]:
        """Launch a step that has been uploaded; addresses of what is made.

        `given` are addresses of inputs. What is made lies in memory that the next step overwrites.
        What is `wanted` of rows of logits is sampled.
        """


class CudaUnit(Launches):
    """Launches a subgraph."""

    def __init__(
        self,
        shared: Shared,
        subgraph: Subgraph,
        weights: Mapping[str, Mapping[str, Weight]],
        tables: Mapping[str, Any],
        limits: Limits,
    ) -> None:
        """`weights` holds each operator's weights by role, `tables` the angles of each `rope`."""
        self.samples = [op for op in subgraph.operators if op.kind == "sample"]
        self._shared = shared
        self._gpu = shared.gpu
        self._cache_type = limits.cache_type
        shared.step.sampled |= bool(self.samples)
        sampled = {name for op in self.samples for name in op.outputs}
        logits = {op.inputs[0]: None for op in self.samples}
        own = tuple(op for op in subgraph.operators if op.kind != "sample")
        outputs = [name for name in subgraph.outputs if name not in sampled]
        made = {name for op in own for name in op.outputs}
        outputs += [name for name in logits if name in made and name not in outputs]
        super().__init__(subgraph, frozenset(outputs))  # less sampled ones, and with logits
        self._stateful: Sequence[Operator] = [op for op in own if op.state is not None]
        kinds = {op.name: _kind(weights[op.name]["weight"]) for op in own if op.kind == "matmul"}
        plain = replace(subgraph, operators=own, outputs=tuple(outputs))
        token = object()
        program = compile_program(plain, kinds)
        self.launches = bool(program.order)
        self.launcher = Launcher(
            gpu=self._gpu,
            arena=shared.arena,
            step=shared.step,
            program=program,
            values=subgraph.values,
            weights=weights,
            tables=tables,
            own=token,
            kept=frozenset((*subgraph.inputs, *outputs)),
        )
        finalize(self, shared.arena.forget, token).atexit = False

    def allocate_state(self, blocks: int, block_size: int) -> None:
        """See `Runner.allocate_state`."""
        with self._gpu.active():
            self.launcher.attention.caches = {
                op.name: allocate_cache(self._gpu, op.state, blocks, block_size, self._cache_type)
                for op in self._stateful
                if op.state is not None
            }

    @property
    def states(self) -> frozenset[str]:
        """See `Launches.states`."""
        return frozenset(self.launcher.attention.caches)

    def export_state(self, name: str, pages: Sequence[int]) -> tuple[Array, ...]:
        """See `Runner.export_state`."""
        cache = self.launcher.attention.caches[name]
        with self._gpu.active():
            chosen = self._gpu.cupy.asarray(np.asarray(pages, np.int64))
            return tuple(part[chosen].get() for part in (cache.keys, cache.values))

    def import_state(self, name: str, pages: Sequence[int], content: tuple[Array, ...]) -> None:
        """See `Runner.import_state`."""
        cache = self.launcher.attention.caches[name]
        with self._gpu.active():
            chosen = self._gpu.cupy.asarray(np.asarray(pages, np.int64))
            for part, own in zip((cache.keys, cache.values), content, strict=True):
                part[chosen] = self._gpu.cupy.asarray(own)
            self._gpu.stream.synchronize()

    def address(self, name: str, counts: Counts) -> int:
        """See `Launches.address`."""
        self.launcher.buffers.start(counts, {})
        return self.launcher.buffers.floats(name)

    def enqueue(self, counts: Counts, wanted: Wanted, given: Mapping[str, int]) -> dict[str, int]:
        """See `Launches.enqueue`."""
        self.launcher.launch(counts, given)
        for op in self.samples if counts.logits else ():
            logits = given.get(op.inputs[0]) or self.launcher.buffers.floats(op.inputs[0])
            vocabulary = self.subgraph.values[op.inputs[0]].width
            sampling.launch(self._shared, logits, vocabulary, counts.logits, wanted)
        return {name: self.launcher.buffers.floats(name) for name in self.made}


def _kind(weight: Weight) -> str:
    return weight.format.name if isinstance(weight, PackedMatrix) else "F32"
