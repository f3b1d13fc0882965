"""Where the values of a subgraph's step lie on the GPU, as floats and in the forms of products."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from raygraft.graph.operators import Value
from raygraft.graph.step import Step
from raygraft.kernels.cuda import sources
from raygraft.kernels.cuda.arguments import FRAGMENTS, FRAGMENTS_SPLIT, ROWS, Packed
from raygraft.kernels.cuda.formats import TILE
from raygraft.kernels.cuda.fusion import (
    CachedAttention,
    Fused,
    Prepare,
    Products,
    Program,
    Single,
    reads,
    writes,
)
from raygraft.kernels.cuda.memory import Arena, assign_slots

FEW = 16
"""Most rows of a step that reads each weight where it lies."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Rows of a step, of tokens and of logits."""

    tokens: int
    logits: int
    apart: bool = False
    """Whether each row is a sequence's only one."""

    @classmethod
    def of(cls, step: Step) -> Counts:
        """The counts of a step."""
        apart = step.rows <= FEW and len(set(step.sequence.tolist())) == step.rows
        return cls(step.rows, len(step.logit_rows), apart)

    def rows(self, value: Value) -> int:
        """How many rows a value has in such a step."""
        return self.logits if value.rows == "logits" else self.tokens


@dataclass(slots=True)
class Buffers:
    """The memory of a program's values; `start` says for which step."""

    arena: Arena
    program: Program
    values: Mapping[str, Value]
    own: object
    """What marks the slots of its inputs and outputs."""
    kept: frozenset[str]
    """Values with memory of their own: inputs and outputs."""
    counts: Counts = field(init=False, default=Counts(0, 0))
    _given: Mapping[str, int] = field(init=False, default_factory=dict)
    _slots: dict[str, int] = field(init=False)
    _packed_slots: dict[str, int] = field(init=False)
    _unscaled: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        order = self.program.order
        # Apart, because what fills up the columns of a packed value must stay finite.
        self._slots = assign_slots([self._float_buffers(one) for one in order])
        self._packed_slots = assign_slots([self._packed_buffers(one) for one in order])
        # What norms and attention make fits into halves as it is.
        self._unscaled = frozenset(
            name
            for one in order
            if isinstance(one, CachedAttention)
            or (isinstance(one, Single) and one.operator.kind == "rms_norm")
            for name in writes(one)
        )

    def _float_buffers(self, one: Fused) -> tuple[frozenset[str], frozenset[str]]:
        """Buffers in float32 that a launch reads and writes."""
        inside = self.program.floats - self.kept
        return frozenset(reads(one)) & inside, frozenset(writes(one)) & inside

    def _packed_buffers(self, one: Fused) -> tuple[frozenset[str], frozenset[str]]:
        """Packed buffers that a launch reads and writes."""
        packed = self.program.packed
        if isinstance(one, Prepare):
            return frozenset(), frozenset((one.value,))
        written = frozenset(writes(one)) & packed - self.program.normed.keys()
        if isinstance(one, Products) and one.normed:
            written |= {one.normed}
        return frozenset(reads(one)) & packed, written

    def start(self, counts: Counts, given: Mapping[str, int]) -> None:
        """Lay out a step. `given` are addresses of inputs; others lie in their own slots."""
        self.counts, self._given = counts, given

    def rows(self, value: str) -> int:
        """How many rows a value has in this step."""
        return self.counts.rows(self.values[value])

    def width(self, value: str) -> int:
        """Elements of a value's row."""
        return self.values[value].width

    def floats(self, value: str) -> int:
        """The address of a value in float32; 0 where nobody needs it so."""
        if value in self._given:
            return self._given[value]
        if value not in self.program.floats and value not in self.kept:
            return 0
        rows = capacity(self.rows(value))
        slot = (self.own, value) if value in self.kept else ("value", self._slots[value])
        return self.arena.room(slot, rows * self.values[value].row_bytes, f"the value {value}")

    def packed(self, value: str, rows: int) -> Packed:
        """Where a value is kept for products; nothing where no product reads it."""
        if value not in self.program.packed:
            return Packed(0, 0, 0, 0)
        columns = self.width(value)
        form, tiles, stride = _form(rows, columns)
        size = capacity(rows) * stride * 2 if form == ROWS else -(-columns // 64) * 1024 * tiles
        slot = ("packed", self._packed_slots[value])
        return Packed(self.arena.room(slot, size, f"the value {value}"), form, tiles, stride)

    def scales(self, value: str, rows: int) -> int:
        """The address of the scales of a value's rows of halves; 0 where it has none."""
        if rows <= FEW or value in self._unscaled:
            return 0
        return self.arena.room(("scales", value), 4 * capacity(rows), "scales of rows")

    def sums(self, value: str) -> int:
        """The address of the sums of squares of a value's rows, one from each block."""
        size = 4 * FEW * -(-self.width(value) // TILE)
        return self.arena.room(("sums", value), size, "sums of squares")

    def factor(self, normed: str) -> int:
        """The address of what the norm that makes a value multiplies rows by."""
        return self.arena.room(("factor", normed), 4 * FEW, "factors of rows")

    def room(self, name: str, size: int) -> int:
        """Memory for one launch or two, shared by all subgraphs of a device."""
        return self.arena.room(name, size, name)


def capacity(rows: int) -> int:
    """Rows that a buffer has room for, so that it seldom grows."""
    return max(FEW, 1 << (rows - 1).bit_length())


def _form(rows: int, columns: int) -> tuple[int, int, int]:
    """Form, tiles of eight columns, and row stride of a packed value."""
    if rows > FEW:
        return ROWS, 0, -(-columns // 8) * 8
    shape = sources.shape_for(rows)
    form = FRAGMENTS_SPLIT if shape.sets == 1 else FRAGMENTS
    return form, shape.column_tiles * shape.sets, 0
