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
from raygraft.kernels.base import Array, Runner, Values
from raygraft.kernels.cpu import attention, instructions, matmul
from raygraft.kernels.cpu.assembly import Assembler, Cache, Floats, Weight
from raygraft.kernels.cpu.cache import CacheLayout
from raygraft.kernels.cpu.lanes import FLOAT_BYTES, LANES
from raygraft.kernels.cpu.packing import PackedWeight
from raygraft.kernels.cpu.products import DOT_ROWS
from raygraft.kernels.cpu.team import Team
from raygraft.kernels.reference.sampling import sample

_LONGEST_RUN = 16
"""Rows of a sequence that one thread attends with at a time."""


class CurrentStep:
    """The numbers and addresses that describe a step to programs, made once for all stages."""

    def __init__(self) -> None:
        self._step: Step | None = None
        self._arrays: Sequence[NDArray[np.int32]] = ()
        self.words = np.zeros(instructions.STEP_WORDS, np.int64)
        self.few = False
        """Whether it has few rows, each of another sequence."""

    def describe(self, step: Step) -> NDArray[np.int64]:
        """The description; what it points to lives until the next step is described."""
        if step is not self._step:
            names = ("positions", "sequence", "block_tables", "logit_rows", "tokens")
            arrays = [np.ascontiguousarray(getattr(step, name), np.int32) for name in names]
            arrays.append(_runs(arrays[0], arrays[1]))
            positions, sequence, tables, wanted, tokens, runs = (a.ctypes.data for a in arrays)
            self.words[:] = (
                step.rows, positions, sequence, tables, arrays[2].shape[1], wanted,
                len(arrays[3]), tokens, runs, len(arrays[5]),
            )  # fmt: skip
            self._step, self._arrays = step, arrays
            self.few = len(arrays[5]) == step.rows <= DOT_ROWS
        return self.words


def _runs(positions: NDArray[np.int32], sequence: NDArray[np.int32]) -> NDArray[np.int32]:
    """Runs of neighbouring rows of one sequence: first row and count, `[runs, 2]`."""
    rows = len(positions)
    if rows == 1:
        return np.array([[0, 1]], np.int32)
    begins = np.ones(rows, bool)
    begins[1:] = (np.diff(sequence) != 0) | (np.diff(positions) != 1)
    first = np.flatnonzero(begins)
    starts = np.concatenate(
        [np.arange(a, b, _LONGEST_RUN) for a, b in zip(first, [*first[1:], rows], strict=True)]
    )
    ends = np.append(starts[1:], rows)
    return np.stack([starts, ends - starts], axis=1).astype(np.int32)


class CpuRunner(Runner):
    """Runs a subgraph on a team of threads. Sampling, which draws few numbers, stays in NumPy."""

    def __init__(
        self,
        subgraph: Subgraph,
        weights: Mapping[str, Mapping[str, Weight]],
        tables: Mapping[str, Floats],
        team: Team,
        current: CurrentStep,
        limits: Limits,
    ) -> None:
        """`weights` holds each operator's weights by role, `tables` the angles of each `rope`.

        `team` and `current` are shared by all runners of a device.
        """
        self._subgraph = subgraph
        self._values = subgraph.values
        self._weights = weights
        self._team = team
        self._current = current
        self._cache_type = limits.cache_type
        self._caches: dict[str, Cache] = {}
        self._programs: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
        self._sampling = [op for op in subgraph.operators if op.kind == "sample"]
        self._compiled = [op for op in subgraph.operators if op.kind != "sample"]
        sampled = [name for op in self._sampling for name in op.inputs]
        made = {name for op in self._compiled for name in op.outputs}
        self._kept = [n for n in dict.fromkeys((*subgraph.outputs, *sampled)) if n in made]
        self._assembler = Assembler(
            self._compiled, self._kept, subgraph.inputs, self._values, weights, tables, limits,
            team.threads,
        )  # fmt: skip
        team.reserve(self._scratch_bytes())

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
        self._programs = None

    def run(self, step: Step, inputs: Values) -> dict[str, Array]:
        """Compute one step."""
        if self._programs is None:
            many, few = (self._assembler.assemble(self._caches, few) for few in (False, True))
            self._programs = many, few
        buffers = self._assembler.buffers
        for name in self._subgraph.inputs:
            if name in buffers:
                buffers[name][: len(inputs[name])] = inputs[name]
        words = self._current.describe(step)
        program = self._programs[self._current.few]
        if len(program):
            self._team.run(program, words)
        found: dict[str, Array] = {**inputs}
        for name in self._kept:
            found[name] = buffers[name][: self._rows(name, step)]
        for op in self._sampling:
            found.update(zip(op.outputs, sample(found[op.inputs[0]], step.sampling), strict=True))
        return {name: found[name] for name in self._subgraph.outputs}

    def _rows(self, value: str, step: Step) -> int:
        return len(step.logit_rows) if self._values[value].rows == "logits" else step.rows

    def _scratch_bytes(self) -> int:
        """What the hungriest instruction needs."""
        most = 0
        for op in self._compiled:
            weight = self._weights.get(op.name, {}).get("weight")
            if isinstance(weight, PackedWeight):
                most = max(most, matmul.scratch_bytes(weight.columns), FLOAT_BYTES * weight.columns)
            if op.state is not None:
                state, heads = op.state, int(dict(op.attributes)["heads"])
                sizes = state.kv_heads, state.key_size, state.value_size
                most = max(most, attention.scratch_bytes(heads, *sizes))
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
