"""A loaded subgraph: its program, its buffers, its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from raygraft.graph.capability import Limits
from raygraft.graph.graph import Subgraph
from raygraft.graph.operators import KeyValueState, Operator
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.graph.step import Step
from raygraft.kernels.base import Array, Runner, Values
from raygraft.kernels.cpu import program as p
from raygraft.kernels.cpu.formats import BLOCK, PackedWeight
from raygraft.kernels.cpu.matmul import FEW_ROWS
from raygraft.kernels.cpu.team import Team
from raygraft.kernels.cpu.vector import LANES
from raygraft.kernels.reference.sampling import sample

Weight = PackedWeight | NDArray[np.float32]
Floats = NDArray[np.float32]
_STEP_WORDS = 8
_KINDS = {
    "rms_norm": p.NORM,
    "matmul": p.MATMUL,
    "rope": p.ROTATE,
    "add": p.ADD,
    "swiglu": p.GATE,
    "select_rows": p.COPY_ROWS,
    "get_rows": p.LOOK_UP,
}


class CurrentStep:
    """The numbers and addresses that describe a step to programs, made once for all stages."""

    def __init__(self) -> None:
        self._step: Step | None = None
        self._arrays: Sequence[NDArray[np.int32]] = ()
        self._words = np.zeros(_STEP_WORDS, np.int64)

    def describe(self, step: Step) -> NDArray[np.int64]:
        """The description; what it points to lives until the next step is described."""
        if step is not self._step:
            names = ("positions", "sequence", "block_tables", "logit_rows", "tokens")
            arrays = [np.ascontiguousarray(getattr(step, name), np.int32) for name in names]
            positions, sequence, tables, wanted, tokens = (array.ctypes.data for array in arrays)
            stride = arrays[2].shape[1]
            self._words[:] = (
                step.rows, positions, sequence, tables, stride, wanted, len(arrays[3]), tokens,
            )  # fmt: skip
            self._step, self._arrays = step, arrays
        return self._words


@dataclass
class Caches:
    """Keys and values of one attention operator, `[blocks, heads, block_size, size]`."""

    keys: Floats
    values: Floats


@dataclass
class _Instruction:
    kind: int
    a: str = ""
    b: str = ""
    c: str = ""
    out: str = ""
    weight: int = 0
    own: tuple[int, ...] = ()
    number: float = 0.0
    addresses: dict[int, int] = field(default_factory=dict)
    """Operands that are no values: column -> address."""


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
        self._tables = tables
        self._team = team
        self._current = current
        self._limits = limits
        self._caches: dict[str, Caches] = {}
        self._block_size = 0
        self._buffers: dict[str, Floats] = {}
        self._program: NDArray[np.int64] | None = None
        self._sampling = [op for op in subgraph.operators if op.kind == "sample"]
        self._compiled = [op for op in subgraph.operators if op.kind != "sample"]
        sampled = [name for op in self._sampling for name in op.inputs]
        made = {name for op in self._compiled for name in op.outputs}
        self._kept = [n for n in dict.fromkeys((*subgraph.outputs, *sampled)) if n in made]
        team.reserve(self._scratch_bytes())

    def allocate_state(self, blocks: int, block_size: int) -> None:
        """One paged cache for each attention operator."""
        self._block_size = block_size
        for op in self._compiled:
            if op.state is not None:
                self._caches[op.name] = _allocate(op.state, blocks, block_size)

    def run(self, step: Step, inputs: Values) -> dict[str, Array]:
        """Compute one step."""
        if self._program is None:
            self._program = self._assemble()
        for name in self._subgraph.inputs:
            if name in self._buffers:
                self._buffers[name][: len(inputs[name])] = inputs[name]
        if len(self._program):
            self._team.run(self._program, self._current.describe(step))
        found: dict[str, Array] = {**inputs}
        for name in self._kept:
            found[name] = self._buffers[name][: self._rows(name, step)]
        for op in self._sampling:
            found.update(zip(op.outputs, sample(found[op.inputs[0]], step.sampling), strict=True))
        return {name: found[name] for name in self._subgraph.outputs}

    def _rows(self, value: str, step: Step) -> int:
        return len(step.logit_rows) if self._values[value].rows == "logits" else step.rows

    def _scratch_bytes(self) -> int:
        """Room for a widened tile, results and sums of a product, or the scores of a head."""
        most = 4 * self._limits.context
        for op in self._compiled:
            weight = self._weights.get(op.name, {}).get("weight")
            if isinstance(weight, PackedWeight):
                tile = 4 * LANES * (weight.columns + 8)
                most = max(most, tile + FEW_ROWS * 4 * (weight.columns // BLOCK + 1))
        return most + 4 * LANES

    def _assemble(self) -> NDArray[np.int64]:
        """The program, with the addresses of buffers and weights."""
        self._allocate_buffers()
        instructions = [i for op in self._compiled for i in self._translate(op)]
        assembled = np.zeros((len(instructions), p.FIELDS), np.int64)
        written: set[int] = set()  # since the threads last met
        read: set[int] = set()
        for row, i in zip(assembled, instructions, strict=True):
            row[p.KIND // 8] = i.kind
            row[p.WEIGHT // 8] = i.weight
            for place, name in ((p.A, i.a), (p.B, i.b), (p.C, i.c), (p.OUT, i.out)):
                if name:
                    row[place // 8] = self._buffers[name].ctypes.data
            for place, address in i.addresses.items():
                row[place // 8] = address
            row[p.OWN // 8 : p.OWN // 8 + len(i.own)] = i.own
            row[p.OWN // 8 + 7 :].view(np.float64)[0] = i.number
            if i.out:
                row[p.LOGIT_SIDE // 8] = self._values[i.out].rows == "logits"
            reads = {int(row[place // 8]) for place in (p.A, p.B, p.C)}
            out = int(row[p.OUT // 8])
            if reads & written or out in read | written:
                row[p.MEET // 8] = 1
                written, read = set(), set()
            written.add(out)
            read |= reads
        return assembled

    def _allocate_buffers(self) -> None:
        """A buffer per value; one that nobody reads any more serves the next value of its width."""
        last = {name: n for n, op in enumerate(self._compiled) for name in op.inputs}
        free: dict[int, list[Floats]] = {}

        def buffer(name: str) -> Floats:
            width = self._values[name].width
            if free.get(width):
                return free[width].pop()
            return np.empty((self._limits.max_rows, width), np.float32)

        for name in self._subgraph.inputs:
            if name in last:
                self._buffers[name] = buffer(name)
        for number, op in enumerate(self._compiled):
            for name in op.outputs:
                self._buffers[name] = buffer(name)
            for name in op.inputs:
                if last[name] == number and name not in self._kept:
                    free.setdefault(self._values[name].width, []).append(self._buffers[name])

    def _translate(self, op: Operator) -> list[_Instruction]:
        """The instructions of one operator."""
        if op.kind == "attention":
            return self._attention(op)
        kind = _KINDS[op.kind]
        width = self._values[op.outputs[0]].width
        weights = self._weights.get(op.name, {})
        weight = weights.get("weight")
        attributes = dict(op.attributes)
        a, b = (*op.inputs, "", "")[:2]
        instruction = _Instruction(kind, a, b, out=op.outputs[0], own=(width,))
        if weight is not None:
            instruction.weight = _address(weight)
        if kind == p.NORM:
            instruction.number = float(attributes["epsilon"])
        elif kind == p.ROTATE:
            rotary = RotaryEmbedding.from_attributes(op.attributes)
            size = width // rotary.heads
            instruction.own = (rotary.heads, size, rotary.size, int(rotary.style == "neox"))
            instruction.weight = _address(self._tables[op.name])
        elif kind == p.MATMUL:
            assert isinstance(weight, PackedWeight)
            code, tile_bytes = weight.format.code, weight.format.tile_bytes(weight.columns)
            instruction.own = (code, weight.columns, weight.rows, weight.tiles, tile_bytes)
            if "bias" in weights:
                instruction.addresses = {p.B: _address(weights["bias"])}
        elif kind == p.LOOK_UP:
            assert isinstance(weight, PackedWeight)
            instruction.own = (weight.format.code, width, weight.format.tile_bytes(width))
        return [instruction]

    def _attention(self, op: Operator) -> list[_Instruction]:
        """Keys and values into the cache, then the attention itself."""
        assert op.state is not None
        q, k, v = op.inputs
        caches, state, size = self._caches[op.name], op.state, self._block_size
        keys, values = caches.keys.ctypes.data, caches.values.ctypes.data
        attributes = dict(op.attributes)
        heads = int(attributes["heads"])
        own = (heads, state.kv_heads, state.key_size, state.value_size, size)
        return [
            _Instruction(
                p.WRITE_CACHE, k, own=(state.kv_heads, state.key_size, size),
                addresses={p.OUT: keys},
            ),
            _Instruction(
                p.WRITE_CACHE, v, own=(state.kv_heads, state.value_size, size),
                addresses={p.OUT: values},
            ),
            _Instruction(
                p.ATTEND, q, out=op.outputs[0], own=own, number=float(attributes["scale"]),
                addresses={p.B: keys, p.C: values},
            ),
        ]  # fmt: skip


def _allocate(state: KeyValueState, blocks: int, block_size: int) -> Caches:
    def zeros(size: int) -> Floats:
        return np.zeros((blocks, state.kv_heads, block_size, size), np.float32)

    return Caches(zeros(state.key_size), zeros(state.value_size))


def _address(weight: Weight) -> int:
    return weight.address if isinstance(weight, PackedWeight) else int(weight.ctypes.data)


def angles(rotary: RotaryEmbedding, context: int, factors: Floats | None) -> Floats:
    """Cosine and sine of each position's pairs, `[context, size / 2, 2]`."""
    turned = np.arange(context)[:, None] * rotary.frequencies(factors)
    pairs = np.stack([np.cos(turned), np.sin(turned)], axis=-1) * rotary.magnitude
    return np.ascontiguousarray(pairs, np.float32)
