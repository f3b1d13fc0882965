"""Each fused operator of a program as kernel launches on the GPU's stream.

Up to FEW rows, every product reads its weights once, as they are. More rows go through cuBLAS: a
matrix is expanded to halves in a scratch buffer that all share, and multiplied there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from raygraft.graph.operators import KeyValueState, Operator, Value
from raygraft.graph.rotary import RotaryEmbedding
from raygraft.graph.step import Step
from raygraft.kernels.cuda import sources
from raygraft.kernels.cuda.arguments import (
    FRAGMENTS,
    FRAGMENTS_SPLIT,
    ROWS,
    Attention,
    Packed,
    Product,
    PromptAttention,
    Rotation,
    integer,
    number,
    pointer,
)
from raygraft.kernels.cuda.formats import TILE
from raygraft.kernels.cuda.fusion import (
    CachedAttention,
    Fused,
    GatedProduct,
    Prepare,
    Products,
    Program,
    Single,
    reads,
    writes,
)
from raygraft.kernels.cuda.gpu import Gpu
from raygraft.kernels.cuda.memory import Arena, assign_slots
from raygraft.kernels.cuda.step import DeviceStep
from raygraft.kernels.cuda.weights import Floats, PackedMatrix, Weight

FEW = 16
"""Most rows of a step that reads each weight where it lies."""
SCRATCH_HALVES = 2**27
"""Elements of a matrix that are expanded at once."""
MOST_SPLITS = 32
"""Shares of a context in the attention of few rows; as in `decode_attention.cu`."""
_THREADS = 256
_COMPUTE_32F = 68  # CUBLAS_COMPUTE_32F
_VECTORS = ((32, 1), (64, 2), (96, 3), (128, 4), (256, 8))
LARGEST_HEAD = 256


@dataclass(slots=True)
class Cache:
    """Keys and values of one attention operator, `[blocks, kv_heads, block_size, room]`."""

    keys: Any
    values: Any
    key_room: int
    value_room: int
    block_size: int
    kind: str


def allocate_cache(
    gpu: Gpu, state: KeyValueState, blocks: int, block_size: int, kind: str
) -> Cache:
    """Room for a paged cache; heads are rounded up to multiples of four elements."""
    dtype = {"f32": "float32", "f16": "float16"}[kind]
    rooms = [-(-size // 4) * 4 for size in (state.key_size, state.value_size)]
    arrays = [
        gpu.allocate(f"the cache {state.name}", (blocks, state.kv_heads, block_size, room), dtype)
        for room in rooms
    ]
    return Cache(arrays[0], arrays[1], rooms[0], rooms[1], block_size, kind)


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


@dataclass(slots=True)
class Launcher:
    """Launches the program of one subgraph."""

    gpu: Gpu
    arena: Arena
    step: DeviceStep
    program: Program
    values: Mapping[str, Value]
    weights: Mapping[str, Mapping[str, Weight]]
    """By operator, by role."""
    tables: Mapping[str, Any]
    """Angles of each `rope`, on the GPU."""
    own: object
    """What marks the slots of its inputs and outputs."""
    kept: frozenset[str]
    """Values with memory of their own: inputs and outputs."""
    caches: dict[str, Cache] = field(default_factory=dict)
    _slots: dict[str, int] = field(init=False)
    _packed_slots: dict[str, int] = field(init=False)
    _given: dict[str, int] = field(init=False, default_factory=dict)
    _counts: Counts = field(init=False, default=Counts(0, 0))

    def __post_init__(self) -> None:
        order = self.program.order
        # Apart, because what fills up the columns of a packed value must stay finite.
        self._slots = assign_slots([self._float_buffers(one) for one in order])
        self._packed_slots = assign_slots([self._packed_buffers(one) for one in order])

    def _float_buffers(self, one: Fused) -> tuple[frozenset[str], frozenset[str]]:
        """Buffers in float32 that a launch reads and writes."""
        inside = self.program.floats - self.kept
        return frozenset(reads(one)) & inside, frozenset(writes(one)) & inside

    def _packed_buffers(self, one: Fused) -> tuple[frozenset[str], frozenset[str]]:
        """Packed buffers that a launch reads and writes."""
        packed = self.program.packed
        if isinstance(one, Prepare):
            return frozenset(), frozenset((one.value,))
        return frozenset(reads(one)) & packed, frozenset(writes(one)) & packed

    def launch(self, counts: Counts, given: Mapping[str, int]) -> None:
        """Launch everything. `given` are addresses of inputs; others lie in their own slots."""
        self._counts = counts
        self._given = dict(given)
        for one in self.program.order:
            rows = self._rows((*writes(one), *reads(one))[0])
            if rows == 0:
                continue
            match one:
                case Prepare():
                    self._prepare(one.value, rows)
                case Products():
                    self._products(one, rows)
                case GatedProduct():
                    self._gated(one, rows)
                case CachedAttention():
                    self._attention(one, rows)
                case Single():
                    self._single(one.operator, rows)

    # Buffers.

    def _rows(self, value: str) -> int:
        logits = self.values[value].rows == "logits"
        return self._counts.logits if logits else self._counts.tokens

    def floats(self, value: str) -> int:
        """The address of a value in float32; 0 where nobody needs it so."""
        if value in self._given:
            return self._given[value]
        if value not in self.program.floats and value not in self.kept:
            return 0
        rows = _capacity(self._rows(value))
        slot = (self.own, value) if value in self.kept else ("value", self._slots[value])
        return self.arena.room(slot, rows * self.values[value].row_bytes, f"the value {value}")

    def floats_of(self, value: str, counts: Counts) -> int:
        """The address of an input or output in a step of so many rows."""
        self._counts, self._given = counts, {}
        return self.floats(value)

    def _packed(self, value: str, rows: int) -> Packed:
        """Where a value is kept for products; nothing where no product reads it."""
        if value not in self.program.packed:
            return Packed(0, 0, 0, 0)
        columns = self.values[value].width
        form, tiles, stride = _form(rows, columns)
        size = _capacity(rows) * stride * 2 if form == ROWS else -(-columns // 64) * 1024 * tiles
        slot = ("packed", self._packed_slots[value])
        return Packed(self.arena.room(slot, size, f"the value {value}"), form, tiles, stride)

    def _scales(self, value: str, rows: int) -> int:
        """The address of the scales of a value's rows of halves; 0 where it has none."""
        if rows <= FEW or not self._scaled(value):
            return 0
        return self.arena.room(("scales", value), 4 * _capacity(rows), "scales of rows")

    def _scaled(self, value: str) -> bool:
        """Whether rows of halves are scaled: those of norms and of attention fit as they are."""
        for one in self.program.order:
            if value in writes(one):
                norm = isinstance(one, Single) and one.operator.kind == "rms_norm"
                return not norm and not isinstance(one, CachedAttention)
        return True

    def _room(self, name: str, size: int) -> int:
        return self.arena.room(name, size, name)

    # Launches.

    def _rows_kernel(self, name: str, grid: tuple[int, int, int], threads: int, *own: Any) -> None:
        kernel = self.gpu.kernel("rows", name, sources.rows_source)
        self.gpu.launch(kernel, grid, threads, own)

    def _prepare(self, value: str, rows: int) -> None:
        self._gate_rows(self.floats(value), 0, value, rows, out=0)

    def _gate_rows(self, gate: int, up: int, value: str, rows: int, out: int) -> None:
        columns = self.values[value].width
        self._rows_kernel(
            "gate_rows", (rows, 1, 1), _threads(columns), pointer(gate), pointer(up),
            integer(columns), pointer(out), self._packed(value, rows),
            pointer(self._scales(value, rows)), integer(columns),
        )  # fmt: skip

    def _add(
        self, a: int, b: int, out: int, columns: int, rows: int, *, scales: int = 0, bias: int = 0
    ) -> None:
        blocks = min(-(-columns // _THREADS), 64)
        self._rows_kernel(
            "add_rows", (blocks, rows, 1), _THREADS, pointer(a), pointer(b), integer(columns),
            pointer(scales), pointer(bias), pointer(out), integer(columns),
        )  # fmt: skip

    def _single(self, op: Operator, rows: int) -> None:
        out = self.floats(op.outputs[0])
        width = self.values[op.outputs[0]].width
        weights = self.weights.get(op.name, {})
        match op.kind:
            case "rms_norm":
                self._rows_kernel(
                    "rms_norm", (rows, 1, 1), _threads(width // 4),
                    pointer(self.floats(op.inputs[0])), pointer(weights["weight"].address),
                    pointer(out), self._packed(op.outputs[0], rows), integer(width),
                    number(float(dict(op.attributes)["epsilon"])),
                )  # fmt: skip
            case "swiglu":
                gate, up = (self.floats(name) for name in op.inputs)
                self._gate_rows(gate, up, op.outputs[0], rows, out)
            case "add":
                a, b = (self.floats(name) for name in op.inputs)
                self._add(a, b, out, width, rows)
            case "select_rows":
                self._rows_kernel(
                    "select_rows", (rows, 1, 1), _threads(width),
                    pointer(self.floats(op.inputs[0])), pointer(self.step.addresses.wanted),
                    pointer(out), integer(width),
                )  # fmt: skip
            case "rope":
                rotation, heads = self._rotation(op)
                self._rows_kernel(
                    "rotate", (rows, heads, 1), 64, pointer(self.floats(op.inputs[0])),
                    pointer(out), pointer(self.step.addresses.positions), rotation,
                    integer(heads), integer(width // heads),
                )  # fmt: skip
            case "get_rows":
                self._look_up(weights["weight"], out, width, rows)
            case kind:
                raise NotImplementedError(f"operator {kind}")

    def _look_up(self, weight: Weight, out: int, width: int, rows: int) -> None:
        tokens = pointer(self.step.addresses.tokens)
        if isinstance(weight, Floats):
            self._rows_kernel(
                "look_up_floats", (rows, 1, 1), _threads(width), pointer(weight.address), tokens,
                pointer(out), integer(width),
            )  # fmt: skip
            return
        kind = weight.format.name
        kernel = self.gpu.kernel(f"expand {kind}", "look_up", lambda: sources.expand_source(kind))
        self.gpu.launch(
            kernel, (rows, 1, 1), _THREADS,
            (pointer(weight.address), tokens, pointer(out), integer(width),
             integer(weight.chunks), number(weight.scale)),
        )  # fmt: skip

    # Products.

    def _products(self, one: Products, rows: int) -> None:
        first = self.weights[one.operators[0].name]["weight"]
        if isinstance(first, Floats):
            self._float_product(one, first, rows)
        elif rows <= FEW:
            self._few_products(one, rows)
        else:
            for op, output in zip(one.operators, one.outputs, strict=True):
                self._many_product(one, op, output, rows)

    def _few_products(self, one: Products, rows: int) -> None:
        arguments = self._product(one.x, one.operators, rows)
        for segment, output in zip(arguments.segments, one.outputs, strict=False):
            segment.out = self.floats(output)
        if one.residual:
            arguments.segments[0].residual = self.floats(one.residual)
        shape = sources.shape_for(arguments.rows)
        blocks = sum(-(-s.tiles // shape.row_tiles) for s in arguments.segments)
        self._run_product(one.operators, arguments, blocks, gated=False)

    def _gated(self, one: GatedProduct, rows: int) -> None:
        operators = (one.gate, one.up)
        if rows > FEW:
            width = self.values[one.output].width
            size = 4 * width * _capacity(rows)
            gate, up = (self._room(f"product {n}", size) for n in (0, 1))
            for op, out in zip(operators, (gate, up), strict=True):
                self._multiply(one.x, op, out, rows)
                self._finish(one.x, op, out, width, rows)
            self._gate_rows(gate, up, one.output, rows, self.floats(one.output))
            return
        arguments = self._product(one.x, operators, rows)
        arguments.segments[0].out = self.floats(one.output)
        arguments.y = self._packed(one.output, rows)
        shape = sources.shape_for(arguments.rows)
        blocks = -(-arguments.segments[0].tiles // shape.row_tiles)
        self._run_product(operators, arguments, blocks, gated=True)

    def _product(self, x: str, operators: tuple[Operator, ...], rows: int) -> Product:
        """Arguments, but for outputs and residual."""
        arguments = Product()
        kinds = self._kinds(operators)
        for segment, op in zip(arguments.segments, operators, strict=False):
            weight = self._matrix(op)
            segment.weights, segment.scale = weight.address, weight.scale
            segment.rows, segment.tiles = weight.rows, weight.tiles
            segment.format = kinds.index(weight.format.name)
            segment.bias = self._bias(op)
        arguments.x = self._packed(x, rows)
        arguments.count, arguments.rows = len(operators), rows
        arguments.chunks = -(-self.values[x].width // 64)
        arguments.columns = 2 * rows if arguments.x.form == FRAGMENTS_SPLIT else rows
        return arguments

    def _kinds(self, operators: tuple[Operator, ...]) -> tuple[str, str]:
        names = sorted({self._matrix(op).format.name for op in operators})
        return names[0], names[-1]

    def _run_product(
        self, operators: tuple[Operator, ...], arguments: Product, blocks: int, *, gated: bool
    ) -> None:
        kinds = self._kinds(operators)
        shape = sources.shape_for(arguments.rows)
        shared = sources.product_shared_bytes(kinds, shape)
        kernel = self.gpu.kernel(
            f"product {kinds[0]} {kinds[1]}",
            sources.product_name(shape, gated),
            lambda: sources.product_source(kinds),
            shared,
        )
        threads = 32 * sources.WARPS
        self.gpu.launch(kernel, (blocks, 1, 1), threads, (arguments,), shared)

    def _matrix(self, op: Operator) -> PackedMatrix:
        weight = self.weights[op.name]["weight"]
        assert isinstance(weight, PackedMatrix)
        return weight

    def _bias(self, op: Operator) -> int:
        bias = self.weights[op.name].get("bias")
        return 0 if bias is None else bias.address

    def _many_product(self, one: Products, op: Operator, output: str, rows: int) -> None:
        width = self.values[output].width
        out = self.floats(output)
        if not one.residual:
            self._multiply(one.x, op, out, rows)
            self._finish(one.x, op, out, width, rows)
            return
        product = self._room("product 0", 4 * width * _capacity(rows))
        self._multiply(one.x, op, product, rows)
        self._add(
            self.floats(one.residual), product, out, width, rows,
            scales=self._scales(one.x, rows), bias=self._bias(op),
        )  # fmt: skip

    def _finish(self, x: str, op: Operator, out: int, width: int, rows: int) -> None:
        """What a product still lacks: the scales of its input's rows, the bias."""
        scales, bias = self._scales(x, rows), self._bias(op)
        if scales or bias:
            self._add(0, out, out, width, rows, scales=scales, bias=bias)

    def _multiply(self, x: str, op: Operator, out: int, rows: int) -> None:
        """By cuBLAS, through rows of halves."""
        weight, packed = self._matrix(op), self._packed(x, rows)
        columns, kind = weight.columns, weight.format.name
        kernel = self.gpu.kernel(f"expand {kind}", "expand", lambda: sources.expand_source(kind))
        stride = -(-columns // 8) * 8
        at_once = max(1, SCRATCH_HALVES // (stride * TILE))
        scratch = self._room("expanded weights", 2 * min(at_once, weight.tiles) * TILE * stride)
        for tile in range(0, weight.tiles, at_once):
            tiles = min(at_once, weight.tiles - tile)
            count = min(weight.rows - tile * TILE, tiles * TILE)
            self.gpu.launch(
                kernel, (-(-weight.chunks // 8), tiles, 1), _THREADS,
                (pointer(weight.address), pointer(scratch), integer(tile), integer(weight.rows),
                 integer(columns), integer(stride), integer(weight.chunks), number(weight.scale)),
            )  # fmt: skip
            self._gemm(
                scratch, stride, packed.data, packed.stride, out + 4 * tile * TILE,
                weight.rows, (count, rows, columns), "float16",
            )  # fmt: skip

    def _float_product(self, one: Products, weight: Floats, rows: int) -> None:
        (op,), (output,) = one.operators, one.outputs
        outputs, columns = weight.shape
        x, out = self.floats(one.x), self.floats(output)
        residual = self.floats(one.residual) if one.residual else 0
        bias = self._bias(op)
        if rows <= FEW:
            self._rows_kernel(
                "product_floats", (-(-outputs // 8), 1, 1), _THREADS, pointer(weight.address),
                pointer(x), pointer(bias), pointer(residual), pointer(out), integer(outputs),
                integer(columns), integer(rows),
            )  # fmt: skip
            return
        size = (outputs, rows, columns)
        if residual:
            product = self._room("product 0", 4 * outputs * _capacity(rows))
            self._gemm(weight.address, columns, x, columns, product, outputs, size, "float32")
            self._add(residual, product, out, outputs, rows, bias=bias)
            return
        self._gemm(weight.address, columns, x, columns, out, outputs, size, "float32")
        if bias:
            self._add(0, out, out, outputs, rows, bias=bias)

    def _gemm(
        self,
        weights: int,
        weights_stride: int,
        x: int,
        x_stride: int,
        out: int,
        out_stride: int,
        size: tuple[int, int, int],
        dtype: str,
    ) -> None:
        """out [rows, outputs] = x [rows, columns] @ weights [outputs, columns].T in float32.

        `size` is (outputs, rows, columns); inputs are of `dtype`. cuBLAS counts columns first.
        """
        from cupy_backends.cuda.libs import cublas  # noqa: PLC0415

        runtime = self.gpu.cupy.cuda.runtime
        kind = runtime.CUDA_R_16F if dtype == "float16" else runtime.CUDA_R_32F
        cublas.gemmEx(
            self.gpu.cupy.cuda.device.get_cublas_handle(), cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N,
            *size, _ONE.ctypes.data, weights, kind, weights_stride, x, kind, x_stride,
            _ZERO.ctypes.data, out, runtime.CUDA_R_32F, out_stride, _COMPUTE_32F, -1,
        )  # fmt: skip

    # Attention.

    def _rotation(self, op: Operator | None) -> tuple[Rotation, int]:
        if op is None:
            return Rotation(0, 0, 0), 0
        rotary = RotaryEmbedding.from_attributes(op.attributes)
        table = int(self.tables[op.name].data.ptr)
        return Rotation(table, rotary.size, int(rotary.style == "neox")), rotary.heads

    def _attention(self, one: CachedAttention, rows: int) -> None:
        op, cache = one.attention, self.caches[one.attention.name]
        state = op.state
        assert state is not None
        attributes = dict(op.attributes)
        at = self.step.addresses
        few = rows <= FEW
        own: Attention | PromptAttention = Attention() if few else PromptAttention()
        own.q, own.out = self.floats(one.q), self.floats(op.outputs[0])
        own.packed = self._packed(op.outputs[0], rows)
        own.keys, own.values = int(cache.keys.data.ptr), int(cache.values.data.ptr)
        own.positions, own.tables, own.stride = at.positions, at.tables, at.stride
        own.heads, own.kv_heads = int(attributes["heads"]), state.kv_heads
        own.key_size, own.value_size = state.key_size, state.value_size
        own.key_room, own.value_room = cache.key_room, cache.value_room
        own.block_size, own.scale = cache.block_size, float(attributes["scale"])
        if isinstance(own, Attention) and self._counts.apart:
            own.k, own.v = self.floats(one.k), self.floats(one.v)
            own.q_turn = self._rotation(one.q_rope)[0]
            own.k_turn = self._rotation(one.k_rope)[0]
        else:
            self._store_heads(one, own, cache.kind, rows)
        if isinstance(own, Attention):
            self._attend_few(own, rows, cache.kind)
        else:
            self._attend_many(own, rows, cache.kind)

    def _store_heads(
        self, one: CachedAttention, own: Attention | PromptAttention, cache_kind: str, rows: int
    ) -> None:
        """Rotate, and write the cache, before any row reads what another one writes."""
        at = self.step.addresses
        queries = self._room("queries", 4 * own.heads * own.key_size * _capacity(rows))
        sizes = (own.key_size, own.value_size, own.key_room, own.value_room, own.block_size)
        self._rows_kernel(
            f"store_heads_{cache_kind}", (rows, own.heads + 2 * own.kv_heads, 1), 64,
            *[pointer(self.floats(name)) for name in (one.q, one.k, one.v)], pointer(queries),
            pointer(own.keys), pointer(own.values), pointer(at.positions), pointer(at.sequence),
            pointer(at.tables), integer(at.stride), self._rotation(one.q_rope)[0],
            self._rotation(one.k_rope)[0], integer(own.heads), integer(own.kv_heads),
            *[integer(size) for size in sizes],
        )  # fmt: skip
        own.q = queries

    def _attend_few(self, own: Attention, rows: int, cache_kind: str) -> None:
        size = max(own.key_size, own.value_size)
        vectors = next(count for most, count in _VECTORS if size <= most)
        group = own.heads // own.kv_heads
        together = 1 if group == 1 else 2 if vectors == 8 else 4
        blocks = own.kv_heads * -(-group // together)
        splits = min(MOST_SPLITS, max(1, -(-2 * self.gpu.processors // (blocks * rows))))
        width = own.value_size + 2
        own.partial = self._room("attention", 4 * FEW * own.heads * MOST_SPLITS * width)
        own.arrived = self._room("attention's counters", 4 * FEW * blocks)
        own.sequence = self.step.addresses.sequence
        shared = sources.decode_attention_shared_bytes(vectors, together, cache_kind)
        kernel = self.gpu.kernel(
            "decode attention",
            f"attend_{cache_kind}_{vectors}_{together}",
            sources.decode_attention_source,
            shared,
        )
        self.gpu.launch(kernel, (splits, blocks, rows), 128, (own,), shared)

    def _attend_many(self, own: PromptAttention, rows: int, cache_kind: str) -> None:
        most = max(own.key_size, own.value_size)
        size = next(known for known in sources.ATTENTION_SIZES if most <= known)
        shared = sources.prompt_attention_shared_bytes(size, cache_kind)
        own.tiles = self.step.addresses.tiles
        kernel = self.gpu.kernel(
            "prompt attention",
            f"attend_prompt_{cache_kind}_{size}",
            sources.prompt_attention_source,
            shared,
        )
        self.gpu.launch(kernel, (self.step.tile_count, own.heads, 1), 128, (own,), shared)


_ONE = np.ones((), np.float32)
_ZERO = np.zeros((), np.float32)


def _form(rows: int, columns: int) -> tuple[int, int, int]:
    """Form, tiles of eight columns, and row stride of a packed value."""
    if rows > FEW:
        return ROWS, 0, -(-columns // 8) * 8
    shape = sources.shape_for(rows)
    form = FRAGMENTS_SPLIT if shape.sets == 1 else FRAGMENTS
    return form, shape.column_tiles * shape.sets, 0


def _capacity(rows: int) -> int:
    """Rows that a buffer has room for, so that it seldom grows."""
    return max(FEW, 1 << (rows - 1).bit_length())


def _threads(work: int) -> int:
    return min(1024, max(64, -(-work // 32) * 32))
