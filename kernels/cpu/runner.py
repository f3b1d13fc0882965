"""A loaded subgraph: its programs, its buffers, its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from raygraft.graph.capability import Limits
from raygraft.graph.errors import ConfigurationError
from raygraft.graph.graph import Subgraph
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.graph.step import Step
from raygraft.kernels.base import Array, NativeRun, Runner, Values
from raygraft.kernels.cpu import attention, drawing, matmul
from raygraft.kernels.cpu.assembly import Assembler, Cache, Floats, Weight
from raygraft.kernels.cpu.cache import CacheLayout
from raygraft.kernels.cpu.described_steps import DescribedSteps
from raygraft.kernels.cpu.lanes import FLOAT_BYTES, LANES
from raygraft.kernels.cpu.packing import PackedWeight
from raygraft.kernels.cpu.team import Team, go_on_function, job_function


class CpuRunner(Runner):
    """Runs a subgraph on a team of threads."""

    def __init__(
        self,
        subgraph: Subgraph,
        weights: Mapping[str, Mapping[str, Weight]],
        tables: Mapping[str, Floats],
        team: Team,
        steps: DescribedSteps,
        limits: Limits,
        spare: dict[int, list[Floats]],
    ) -> None:
        """`weights` holds each operator's weights by role, `tables` the angles of each `rope`.

        `team`, `steps` and `spare` (see `Assembler`) are shared by all runners of a device.
        """
        self._subgraph = subgraph
        self._values = subgraph.values
        self._weights = weights
        self._team = team
        self._steps = steps
        self._cache_type = limits.cache_type
        self._caches: dict[str, Cache] = {}
        self._job: NDArray[np.int64] | None = None
        self._compiled = [op for op in subgraph.operators if op.kind != "sample"]
        sampling = [op for op in subgraph.operators if op.kind == "sample"]
        self._sampling = sampling[0] if sampling else None
        """The graph has no more than one."""
        made = {name for op in self._compiled for name in op.outputs}
        self._kept = [name for name in subgraph.outputs if name in made]
        logits = self._sampling.inputs[0] if self._sampling is not None else None
        steps.sampled |= logits is not None
        self._assembler = Assembler(
            self._compiled, self._kept, subgraph.inputs, self._values, weights, tables, limits,
            team.threads, spare, logits,
        )  # fmt: skip
        team.reserve(self._scratch_bytes(limits.max_rows))

    def allocate_state(self, blocks: int, block_size: int) -> None:
        """One paged cache for each attention operator. Pages hold whole tiles of 16 tokens."""
        if block_size % LANES:
            raise ConfigurationError(
                f"pages of {block_size} tokens: the cpu backend needs a multiple of {LANES}"
            )
        for op in self._compiled:
            if op.state is not None:
                layout = CacheLayout(op.state, block_size, self._cache_type)
                pages = blocks * op.state.kv_heads
                self._caches[op.name] = Cache(
                    layout, _zeros(pages * layout.keys_page), _zeros(pages * layout.values_page)
                )
        self._job = None

    def export_state(self, name: str, pages: Sequence[int]) -> tuple[Array, ...]:
        """Keys and values, as bytes."""
        return tuple(paged[pages] for paged in self._pages_of(name))

    def import_state(self, name: str, pages: Sequence[int], content: tuple[Array, ...]) -> None:
        """See `Runner.import_state`."""
        for paged, own in zip(self._pages_of(name), content, strict=True):
            paged[pages] = own

    def hand_on_state(self, name: str) -> Cache:
        """See `Runner.hand_on_state`."""
        return self._caches[name]

    def take_state(self, name: str, state: object) -> bool:
        """See `Runner.take_state`. Programs hold addresses of caches: they are made anew."""
        own = self._caches[name]
        if state is own:
            return True
        if not isinstance(state, Cache) or state.layout != own.layout:
            return False
        if (state.keys.nbytes, state.values.nbytes) != (own.keys.nbytes, own.values.nbytes):
            return False
        self._caches[name], self._job = state, None
        return True

    def _pages_of(self, name: str) -> tuple[Array, Array]:
        """A cache's keys and values `[blocks, bytes]`."""
        cache = self._caches[name]
        layout, heads = cache.layout, cache.layout.state.kv_heads
        keys = cache.keys[:-FLOAT_BYTES].reshape(-1, heads * layout.keys_page)
        values = cache.values[:-FLOAT_BYTES].reshape(-1, heads * layout.values_page)
        return keys, values

    def run(self, step: Step, inputs: Values) -> dict[str, Array]:
        """Compute one step."""
        job = self._assembled()
        buffers = self._assembler.buffers
        for name in self._subgraph.inputs:
            if name in buffers:
                buffers[name][: len(inputs[name])] = inputs[name]
        described = self._steps.describe(step)
        self._team.run(job, described.words)
        found: dict[str, Array] = {**inputs}
        for name in self._kept:
            found[name] = buffers[name][: self._rows(name, step)]
        if self._sampling is not None:
            found.update(zip(self._sampling.outputs, described.sampled(0), strict=True))
        # Other subgraphs use the same buffers.
        return {
            name: found[name].copy() if name in buffers else found[name]
            for name in self._subgraph.outputs
        }

    def run_several(self, step: Step, steps: int) -> list[dict[str, Array]] | None:
        """See `Runner.run_several`: the threads meet between two steps, and that is all."""
        op = self._sampling
        if op is None or self._subgraph.inputs or {*self._subgraph.outputs} - {*op.outputs}:
            return None
        if step.rows != len(step.logit_rows) or len(step.sampling.history):
            return None
        described = self._steps.describe(step, steps, in_one_run=True)
        self._team.run(self._assembled(), described.words)
        return [dict(zip(op.outputs, described.sampled(n), strict=True)) for n in range(steps)]

    def native(self) -> NativeRun | None:
        """How to run it without Python."""
        buffers = self._assembler.buffers
        samples = self._sampling.outputs if self._sampling is not None else ()
        outputs = [name for name in self._subgraph.outputs if name not in samples]
        if not all(name in buffers for name in (*self._subgraph.inputs, *outputs)):
            return None
        return NativeRun(
            job_function(),
            int(self._assembled().ctypes.data),
            {name: int(buffers[name].ctypes.data) for name in self._subgraph.inputs},
            {name: int(buffers[name].ctypes.data) for name in outputs},
            samples,
            go_on_function(),
        )

    def describe_step(self, step: Step, steps: int = 1) -> int:
        """See `Runner.describe_step`."""
        return int(self._steps.describe(step, steps).words.ctypes.data)

    def sampled(self, step: Step, number: int) -> dict[str, Array]:
        """See `Runner.sampled`."""
        assert self._sampling is not None
        samples = self._steps.describe(step).sampled(number)
        return dict(zip(self._sampling.outputs, samples, strict=True))

    def _assembled(self) -> NDArray[np.int64]:
        if self._job is None:
            programs = (self._assembler.assemble(self._caches, few) for few in (False, True))
            self._job = self._team.job_of(*programs)
        return self._job

    def _rows(self, value: str, step: Step) -> int:
        return len(step.logit_rows) if self._values[value].rows == "logits" else step.rows

    def _scratch_bytes(self, rows: int) -> int:
        """What the hungriest instruction needs."""
        most = 0
        for op in self._compiled:
            weight = self._weights.get(op.name, {}).get("weight")
            if isinstance(weight, PackedWeight):
                columns = weight.columns
                own = matmul.scratch_bytes(columns, rows, weight.format)
                most = max(most, own, FLOAT_BYTES * columns)
            if op.state is not None:
                state, heads = op.state, int(dict(op.attributes)["heads"])
                sizes = state.kv_heads, state.key_size, state.value_size
                most = max(most, attention.scratch_bytes(heads, *sizes))
        if self._sampling is not None:
            width = self._values[self._sampling.inputs[0]].width
            most = max(most, drawing.scratch_bytes(width))
        return most + FLOAT_BYTES


def _zeros(size: int) -> NDArray[np.uint8]:
    """Zeroed memory, with room behind it: vectors are loaded whole."""
    return np.zeros(size + FLOAT_BYTES, np.uint8)


def angles(rotary: RotaryEmbedding, context: int, factors: Floats | None) -> Floats:
    """What `layers.rotate` multiplies with, `[context, 2, size]`: cosines, then sines.

    The first number of a pair takes its partner times minus sine, the second times sine.
    """
    turned = np.arange(context)[:, None] * rotary.frequencies(factors)
    cosine, sine = np.cos(turned) * rotary.magnitude, np.sin(turned) * rotary.magnitude
    if rotary.style == "neox":
        pair = (np.concatenate([cosine, cosine], 1), np.concatenate([-sine, sine], 1))
    else:
        pair = (np.repeat(cosine, 2, 1), np.stack([-sine, sine], 2).reshape(context, -1))
    return np.ascontiguousarray(np.stack(pair, axis=1), np.float32)
